"""Interface of the engines that train one player's network: gradients averaged over ranks, and optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distgan.distributed.parts import Held, Stored

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class EngineRuntime(Protocol):
    """Part of `Runtime` that engines use."""

    device: torch.device
    world_size: int
    accelerator: Any
    gradients_in_bf16: bool
    """True if gradients are reduced over ranks in bfloat16."""
    sharded: dict[nn.Module, Any]
    """Networks with sharded weights -> what gathers them."""
    mesh: Any
    """Device mesh that weights are sharded over; None before the first engine."""

    def register_group(self, group: Any) -> None:
        """Apply the run's timeout to a process group that the engine created."""


class Engine(Protocol):
    """Objective of one player, and the optimizer of its network. Collective: call every method on every rank."""

    name: str
    """Name in messages, such as `DDP`."""
    regroups_moments: bool
    """True if `update_param_groups` can keep the moments of parameters that start training at different times."""
    module: nn.Module
    """Wrapped objective; calling it is a forward pass."""
    optimizer: torch.optim.Optimizer
    """Optimizer of this rank's weights or shard. It skips a step if its attribute `found_inf` is 1."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Context manager for the forward and backward pass of one micro-batch.

        Args:
            last: True for the last micro-batch of an update. Gradients accumulate until then.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss that the caller divided by the number of micro-batches."""

    def step(self, settings: Mapping[str, Any], max_norm: float | None = None) -> Tensor:
        """Take one optimizer step on the averaged gradients, then clear them.

        A non-finite gradient norm cancels the step: weights and optimizer state do not change. The host does not wait
        for the norm.

        Args:
            settings: values for the optimizer's parameter groups, such as `lr` and `betas`.
            max_norm: gradients of a larger norm are scaled down to it; None never scales.

        Returns:
            Gradient norm over all parameters before that, a 0-d tensor, the same on all ranks.
        """

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Fix the summation order of gradients before the first update. `arguments` are those of the objective."""

    def update_param_groups(self, *, keep_moments: bool) -> None:
        """Call this after parameters changed `requires_grad`: only those that require gradients are trained.

        Args:
            keep_moments: keep the optimizer's moments if the engine can; see `regroups_moments`.
        """

    def change_weights(self, parameters: Iterable[nn.Parameter], change: Callable[[Tensor], Any]) -> None:
        """Change weights outside the optimizer, in their shards and FP32 master copies too.

        Args:
            change: changes a tensor in place. It must be elementwise, because it may get only a shard.
        """

    def weights(self) -> dict[str, Held]:
        """Return the network's state dict, with this rank's part of sharded tensors. All are live, not copies."""

    def load_weights(self, tensors: Mapping[str, Stored]) -> None:
        """Load a state dict whose names and shapes the caller has checked."""

    def optimizer_state(self) -> dict[str, Held]:
        """Return `PARAMETER/QUANTITY` -> tensor, with this rank's part of sharded tensors. Empty before the first step.

        All ranks return the same names. The tensors are live, not copies.
        """

    def load_optimizer_state(self, tensors: Mapping[str, Stored]) -> None:
        """Load what `optimizer_state` returns, whole. An empty mapping clears the state.

        The caller has checked names and shapes.
        """

    def close(self) -> None:
        """Drop what would keep the network in memory after its last use."""


def cancel_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Cancel the optimizer's next step on the device if the gradient norm, a 0-d tensor, is not finite."""
    optimizer.found_inf = 1.0 - norm.isfinite().float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def clip(parameters: Iterable[Tensor], norm: Tensor, max_norm: float | None) -> None:
    """Scale the gradients of parameters, or of their shards, whose norm over all ranks is `norm`. See `Engine.step`."""
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def apply_settings(optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> None:
    """Set values of all parameter groups."""
    for group in optimizer.param_groups:
        group.update(settings)


def by_parameter(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Convert `PARAMETER/QUANTITY` -> tensor into parameter -> quantity -> tensor."""
    nested: dict[str, dict[str, Stored]] = {}
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        nested.setdefault(name, {})[quantity] = tensor
    return nested


def state_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return one parameter's optimizer state as tensors. Numbers become 0-d tensors, and None is left out."""
    return {
        quantity: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for quantity, value in state.items()
        if value is not None
    }


def is_count(quantity: str, value: Tensor | Stored, parameter: Tensor) -> bool:
    """Return True if a tensor of the optimizer's state is one number for the whole parameter, such as `step`."""
    return quantity == "step" or (value.dim() == 0 and parameter.dim() > 0)


def restore_state(optimizer: torch.optim.Optimizer, parameter: Tensor, quantity: str, stored: Stored) -> Tensor:
    """Return a saved tensor as the optimizer keeps it for a parameter."""
    value = stored.whole()
    if value.shape == parameter.shape and not is_count(quantity, value, parameter):
        # Fused optimizer kernels ignore strides, so moments need the memory layout of their parameter.
        return torch.empty_like(parameter, requires_grad=False, dtype=value.dtype).copy_(value)
    group = optimizer.param_groups[0]
    # Only these kernels count updates on the device.
    on_device = quantity != "step" or group.get("fused") or group.get("capturable")
    return value.to(parameter.device if on_device else "cpu", copy=True)
