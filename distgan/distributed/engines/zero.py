"""Engine for DeepSpeed's ZeRO-1 and ZeRO-2 (Rajbhandari et al. 2020).

Both shard the optimizer state across ranks; ZeRO-2 also shards the gradients. Every rank has all weights in float32.
In addition each rank has FP32 master weights of its shard: the optimizer updates them, and DeepSpeed then copies them
into the weights of all ranks.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

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
from distgan.distributed.parts import Held, Part, Stored, load_parts
from distgan.errors import UserError

_BUCKET_SIZE = 6_553_600
"""Default number of gradients per all-reduce: 25 MiB of float32, as in DDP. All-reduces of larger buckets start later,
so less communication overlaps with the backward pass."""


class ZeroEngine:
    """DeepSpeed ZeRO-1 or ZeRO-2, as `config` says. See `Engine`."""

    regroups_moments = False

    def __init__(
        self,
        objective: nn.Module,
        network: nn.Module,
        make_optimizer: MakeOptimizer,
        runtime: EngineRuntime,
        config: Mapping[str, Any],
    ) -> None:
        self.network, self._runtime = network, runtime
        self._objective, self._make_optimizer = objective.to(runtime.device), make_optimizer
        self._config = copy.deepcopy(dict(config))
        self.name = f"DeepSpeed ZeRO-{config['zero_optimization']['stage']}"
        if runtime.gradients_in_bf16:
            self._config["communication_data_type"] = "bf16"
        # DeepSpeed allocates its buffers at this size even for a small network. Its default takes 4 GB per player.
        settings, size = self._config["zero_optimization"], sum(weight.numel() for weight in network.parameters())
        settings["reduce_bucket_size"] = min(size, int(settings.get("reduce_bucket_size", _BUCKET_SIZE)))
        self._initialize()

    def _initialize(self) -> None:
        self.optimizer = self._make_optimizer(list(self._trained.values()))
        self.optimizer.register_step_pre_hook(self._before_step)
        deepspeed = _import_deepspeed()
        try:
            self.module, *_ = deepspeed.initialize(
                model=self._objective, optimizer=self.optimizer, config=copy.deepcopy(self._config)
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"DeepSpeed config: {key}: {first['msg']}; fix or remove it", everywhere=True) from None
        self._runtime.register_group(self.module.data_parallel_group)

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        self.module.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self, settings: Mapping[str, Any], max_norm: float | None = None) -> Tensor:
        apply_settings(self.optimizer, settings)
        self._max_norm = max_norm
        self.module.step()
        return self._norm

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # DeepSpeed has just set the gradient of this rank's shard to the average over ranks.
        gradient = self._share.grad
        assert gradient is not None
        square = collectives.all_reduce_sum(torch.linalg.vector_norm(gradient).double().square())
        self._norm = square.sqrt().to(gradient.dtype)
        clip([self._share], self._norm, self._max_norm)
        cancel_unless_finite(optimizer, self._norm)

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Do nothing: DeepSpeed's buckets follow the order of the parameters from the first update on."""

    def update_param_groups(self, *, keep_moments: bool) -> None:
        # The moments are always reset. DeepSpeed trains one flat tensor, and Adam has one step count per tensor, but
        # parameters that start later need their own.
        self.module.destroy()
        for parameter in self.network.parameters():
            parameter.data = parameter.data.clone()  # so that the old flat tensor is freed
        self._initialize()

    @torch.no_grad()
    def change_weights(self, parameters: Iterable[nn.Parameter], change: Callable[[Tensor], Any]) -> None:
        for parameter in parameters:
            change(parameter)
        self.module.optimizer.refresh_fp32_params()

    def weights(self) -> dict[str, Held]:
        return dict(self.network.state_dict())

    def load_weights(self, tensors: Mapping[str, Stored]) -> None:
        load_parts(self.network.state_dict(), tensors)
        self.module.optimizer.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Held]:
        return {
            f"{name}/{quantity}": value
            if is_count(quantity, value, self._share)
            else Part(value[own.offset : own.offset + own.length], own.start, parameter.shape)
            for quantity, value in state_tensors(self.optimizer.state.get(self._share, {})).items()
            for name, parameter in self._trained.items()
            for own in [_own_fragment(parameter)]
        }

    def load_optimizer_state(self, tensors: Mapping[str, Stored]) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        moments, share, parameters = by_parameter(tensors), self._share, self._trained
        if not moments:
            self.optimizer.state.clear()
            return
        first = next(iter(moments))
        self.optimizer.state[share] = state = {
            quantity: restore_state(self.optimizer, share, quantity, value)
            if is_count(quantity, value, parameters[first])
            else torch.zeros_like(share)
            for quantity, value in moments[first].items()
        }
        for name, quantities in moments.items():
            own = _own_fragment(parameters[name])
            for quantity, value in quantities.items():
                if not is_count(quantity, value, parameters[name]):
                    values = value.elements(own.start, own.start + own.length)
                    state[quantity][own.offset : own.offset + own.length].copy_(values)
        lazy_init_hp_params_optimizer_state(list(parameters.values()), share, self.optimizer.state)

    def close(self) -> None:
        self.module.destroy()  # its hooks on the parameters refer to it, and Python cannot collect them

    @property
    def _share(self) -> Tensor:
        """This rank's shard of the FP32 master weights, shape (n,). It is the optimizer's only parameter."""
        (share,) = self.optimizer.param_groups[0]["params"]
        assert isinstance(share, Tensor)
        return share


class _Fragment(NamedTuple):
    """Elements of a parameter whose optimizer state this rank has."""

    start: int
    """Row-major index of the first element in the parameter."""
    offset: int
    """Its index in this rank's shard."""
    length: int


def _own_fragment(parameter: nn.Parameter) -> _Fragment:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed; None without elements here
    if mapping is None:
        return _Fragment(0, 0, 0)
    inside, own = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return _Fragment(inside.start, own.start, own.numel)


def _import_deepspeed() -> Any:
    """Import DeepSpeed, silence its log, and disable its shared-memory all-reduce.

    Training does not use that all-reduce, and DeepSpeed would compile it on a CPU for half a minute.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer torch versions deprecate.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
