"""Engine for FSDP2: weights, gradients and optimizer state of a player are sharded across ranks.

The whole objective is one FSDP unit, so all its weights are gathered from the start of the forward pass to the end of
the backward pass. With one unit per layer, the second derivative of a gradient penalty would lose gradients. All other
code reads a network's weights inside `Runtime.full_params`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distgan.distributed import collectives
from distgan.distributed.engines.base import (
    EngineRuntime,
    MakeOptimizer,
    apply_settings,
    by_parameter,
    cancel_unless_finite,
    clip,
    is_count,
    restore_state,
    state_tensors,
)
from distgan.distributed.parts import Held, Part, Stored, load_parts, local_part
from distgan.errors import UserError


def check_fsdp_config() -> None:
    """Check the FSDP settings of the launcher.

    Raises:
        UserError: FSDP cannot read them, or they ask for FSDP1, automatic wrapping or CPU offloading.
    """
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"the FSDP config cannot be used: {' '.join(str(error).split())}", everywhere=True) from None
    if plugin.fsdp_version != 2:
        raise UserError(
            f"fsdp_version: {plugin.fsdp_version}: FSDP1 does not support the second derivatives that gradient "
            "penalties need; use fsdp_version: 2",
            everywhere=True,
        )
    if plugin.auto_wrap_policy is not None:
        raise UserError(
            "fsdp_auto_wrap_policy: wrapping single layers loses gradients of a gradient penalty; use NO_WRAP",
            everywhere=True,
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("fsdp_offload_params: distgan does not support CPU offloading; use false", everywhere=True)
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing: distgan keeps the activations; use false, and lower the memory with "
            "training.gradient_accumulation_steps",
            everywhere=True,
        )
    if plugin.ignored_modules is not None:
        raise UserError("fsdp_ignored_modules: distgan shards all weights of a player; leave it out", everywhere=True)


class FSDPEngine:
    """FSDP2. See `Engine`."""

    name = "FSDP2"
    regroups_moments = True

    def __init__(self, objective: nn.Module, network: nn.Module, make_optimizer: MakeOptimizer, runtime: EngineRuntime):
        self.network, self._runtime = network, runtime
        mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if runtime.gradients_in_bf16 else None)
        self.module = objective.to(runtime.device)
        reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD")
        self._fsdp = runtime.sharded[network] = fully_shard(
            self.module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard
        )
        # Plain tensors that share memory with the shards, because not every optimizer supports DTensor.
        self._shares = {name: nn.Parameter(_local(parameter)) for name, parameter in network.named_parameters()}
        self.optimizer = make_optimizer(list(self._shares.values()))

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        self._fsdp.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, settings: Mapping[str, Any], max_norm: float | None = None) -> Tensor:
        parameters = dict(self.network.named_parameters())
        for name, share in self._shares.items():
            gradient = parameters[name].grad
            share.grad = _local(gradient) if gradient is not None else None
            parameters[name].grad = None
        square = torch.nn.utils.get_total_norm([p.grad for p in self._shares.values() if p.grad is not None]).double()
        norm = collectives.all_reduce_sum(square.square()).sqrt().to(next(iter(self._shares.values())).dtype)
        clip(self._shares.values(), norm, max_norm)
        apply_settings(self.optimizer, settings)
        cancel_unless_finite(self.optimizer, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Do nothing: FSDP2 sums gradients in the same order from the first update on."""

    def update_param_groups(self, *, keep_moments: bool) -> None:
        # FSDP2 checks in each backward pass which parameters have gradients.
        if not keep_moments:
            self.optimizer.state.clear()

    @torch.no_grad()
    def change_weights(self, parameters: Iterable[nn.Parameter], change: Callable[[Tensor], Any]) -> None:
        for parameter in parameters:
            change(_local(parameter))

    def weights(self) -> dict[str, Held]:
        return {name: local_part(tensor) for name, tensor in self.network.state_dict().items()}

    def load_weights(self, tensors: Mapping[str, Stored]) -> None:
        load_parts(self.network.state_dict(), tensors)

    def optimizer_state(self) -> dict[str, Held]:
        parameters = dict(self.network.named_parameters())
        return {
            f"{name}/{quantity}": value
            if is_count(quantity, value, parameters[name])
            else _share_of(parameters[name])._replace(values=value)
            for name, share in self._shares.items()
            for quantity, value in state_tensors(self.optimizer.state.get(share, {})).items()
        }

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, Stored]) -> None:
        self.optimizer.state.clear()
        parameters = dict(self.network.named_parameters())
        for name, quantities in by_parameter(tensors).items():
            share, part = self._shares[name], _share_of(parameters[name])
            self.optimizer.state[share] = state = {}
            for quantity, value in quantities.items():
                if is_count(quantity, value, parameters[name]):
                    state[quantity] = restore_state(self.optimizer, share, quantity, value)
                else:
                    own = value.elements(part.start, part.start + share.numel())
                    state[quantity] = torch.empty_like(share, requires_grad=False).copy_(own.view(share.shape))

    def close(self) -> None:
        del self._runtime.sharded[self.network]


def _share_of(parameter: Tensor) -> Part:
    part = local_part(parameter)
    assert isinstance(part, Part)
    return part


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor. It shares memory with the DTensor."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local()
