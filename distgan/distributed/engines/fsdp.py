"""Engine for FSDP2: weights, gradients and optimizer state of a player are sharded across ranks.

A network that declares blocks (see `distributed.blocks`) is sharded block by block: a block's weights are gathered when
a pass reaches it. Otherwise the whole objective is one FSDP unit, so all its weights are gathered from the start of the
forward pass to the end of the backward pass, and code in the objective may use them outside of the network's forward.
All other code reads a network's weights inside `Runtime.full_params`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
from distgan.distributed.engines.fsdp_config import replicas, reshards_after_forward
from distgan.distributed.parts import Held, Part, Stored, load_parts, local, local_part


class ShardedNetwork:
    """A network whose weights are sharded.

    Args:
        network: the network, or the objective if that is one FSDP unit.
        blocks: FSDP units inside the network; none for an objective.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[nn.Module], **options: Any) -> None:
        self.by_block = bool(blocks)
        self._reshards = reshards_after_forward()
        for block in blocks:
            fully_shard(block, reshard_after_forward=self._reshards, **options)
        # Layers around the blocks are the first and the last that a backward pass needs.
        around = False if self.by_block else self._reshards
        self.root: Any = fully_shard(network, reshard_after_forward=around, **options)
        self._blocks: list[Any] = list(blocks)

    def unshard(self) -> None:
        """Gather all weights on every rank. Collective: call on every rank."""
        for unit in (self.root, *self._blocks):
            unit.unshard()

    def reshard(self) -> None:
        """Keep this rank's shards only."""
        for unit in (self.root, *self._blocks):
            unit.reshard()

    @contextmanager
    def passing(self, *, twice: bool) -> Iterator[None]:
        """Context manager for the passes of an update; see `Runtime.passing`."""
        if not self.by_block:
            yield
            return
        if twice:
            self._keep_gathered(True)
        try:
            yield
        finally:
            if twice:
                self._keep_gathered(False)
            self.reshard()

    def _keep_gathered(self, keep: bool) -> None:
        """Keep weights once they are gathered: a second derivative looks at them again after the backward hooks."""
        self.root.set_reshard_after_backward(not keep)
        for block in self._blocks:
            block.set_reshard_after_forward(self._reshards and not keep)


class FSDPEngine:
    """FSDP2. See `Engine`."""

    name = "FSDP2"
    regroups_moments = True

    def __init__(
        self,
        objective: nn.Module,
        network: nn.Module,
        make_optimizer: MakeOptimizer,
        runtime: EngineRuntime,
        blocks: Sequence[nn.Module],
    ) -> None:
        self.network, self._runtime = network, runtime
        mesh = _mesh(runtime)
        self._shard_group = mesh.get_group("shard") if mesh.ndim == 2 else None
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if runtime.gradients_in_bf16 else None)
        # Between replicas, sums over micro-batches are exchanged. FSDP2 would keep such sums in bfloat16.
        self._exchanges_last = bool(blocks) and not runtime.gradients_in_bf16
        self.module = objective.to(runtime.device)
        self._sharded = runtime.sharded[network] = ShardedNetwork(
            network if blocks else self.module, blocks, mesh=mesh, mp_policy=policy
        )
        # Plain tensors that share memory with the shards, because not every optimizer supports DTensor.
        self._shares = {name: nn.Parameter(local(parameter)) for name, parameter in network.named_parameters()}
        self.optimizer = make_optimizer(list(self._shares.values()))

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        # Gradients of blocks are reduced in every micro-batch: whole ones would take more memory than they save time.
        self._sharded.root.set_requires_gradient_sync(last or self._sharded.by_block)
        if self._exchanges_last:
            self._sharded.root.set_requires_all_reduce(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, settings: Mapping[str, Any], max_norm: float | None = None) -> Tensor:
        parameters = dict(self.network.named_parameters())
        for name, share in self._shares.items():
            gradient = parameters[name].grad
            share.grad = local(gradient) if gradient is not None else None
            parameters[name].grad = None
        square = torch.nn.utils.get_total_norm([p.grad for p in self._shares.values() if p.grad is not None]).double()
        norm = self._sum_over_shards(square.square()).sqrt().to(next(iter(self._shares.values())).dtype)
        clip(self._shares.values(), norm, max_norm)
        apply_settings(self.optimizer, settings)
        cancel_unless_finite(self.optimizer, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum_over_shards(self, number: Tensor) -> Tensor:
        """Return the sum over the ranks of one replica."""
        if self._shard_group is None:
            return collectives.all_reduce_sum(number)
        total = number.detach().clone()
        dist.all_reduce(total, group=self._shard_group)
        return total

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Do nothing: FSDP2 sums gradients in the same order from the first update on."""

    def update_param_groups(self, *, keep_moments: bool) -> None:
        # FSDP2 checks in each backward pass which parameters have gradients.
        if not keep_moments:
            self.optimizer.state.clear()

    @torch.no_grad()
    def change_weights(self, parameters: Iterable[nn.Parameter], change: Callable[[Tensor], Any]) -> None:
        for parameter in parameters:
            change(local(parameter))

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


def _mesh(runtime: EngineRuntime) -> Any:
    """Return the ranks as one dimension, or as replicas of shards."""
    if runtime.mesh is None:
        ranks, copies = runtime.world_size, replicas(runtime.world_size)
        if copies == 1:
            runtime.mesh = init_device_mesh(runtime.device.type, (ranks,))
        else:
            names = ("replicate", "shard")
            runtime.mesh = init_device_mesh(runtime.device.type, (copies, ranks // copies), mesh_dim_names=names)
            for name in names:
                runtime.register_group(runtime.mesh.get_group(name))
    return runtime.mesh
