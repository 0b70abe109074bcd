"""What a player asks of whatever trains its network: gradients averaged over ranks, and an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class EngineRuntime(Protocol):
    """What an engine needs of the processes of a run; `Runtime` has it."""

    device: torch.device
    world_size: int
    accelerator: Any
    gradients_in_bf16: bool
    """Whether gradients are reduced over ranks in bf16."""
    sharded: dict[nn.Module, Any]
    """Networks whose weights are sharded, with the module that gathers them."""

    def register_group(self, group: Any) -> None:
        """Apply the run's time-out to a process group that the engine created."""


class Engine(Protocol):
    """One player's objective on all ranks, and the optimizer of its network. Every rank calls every method."""

    name: str
    """As users know it."""
    regroups_moments: bool
    """Whether `update_param_groups` can keep the moments of parameters that join at different times."""
    module: nn.Module
    """The objective; calling it is a forward pass."""
    optimizer: torch.optim.Optimizer
    """Of what this rank keeps of the weights. It cancels a step by its attribute `found_inf`."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Forward and backward of one micro-batch go inside. Gradients add up until they are averaged in the last."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, which was already divided by the number of micro-batches."""

    def step(self, learning_rate: float) -> Tensor:
        """One optimizer step on the averaged gradients, which are then forgotten.

        Returns their norm, a 0-d tensor, the same on all ranks. If it is not finite, weights and optimizer state stay
        as they are; the host does not wait to learn of it.
        """

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Make the first gradients be summed in the order of all later ones; `arguments` are of the objective."""

    def update_param_groups(self, *, keep_moments: bool) -> None:
        """Train those of the network's parameters that require gradients now, and no others."""

    def change_weights(self, parameters: Iterable[nn.Parameter], change: Callable[[Tensor], Any]) -> None:
        """Change weights outside the optimizer: in place, entry by entry, and wherever copies of them are kept."""

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict, whole on rank 0. Its tensors may be those in use, not copies."""

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `weights`, from the same tensors on all ranks. The caller has checked names and shapes."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `PARAMETER/QUANTITY`, whole on rank 0; none before the first step."""

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `optimizer_state`, from the same tensors on all ranks. The caller has checked names and shapes."""


def cancel_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Make the optimizer's next step change nothing if the norm of its gradients is not finite."""
    optimizer.found_inf = 1.0 - norm.isfinite().float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`PARAMETER/QUANTITY` -> tensor, as parameter -> quantity -> tensor."""
    nested: dict[str, dict[str, Tensor]] = {}
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


def is_count(quantity: str, value: Tensor, parameter: Tensor) -> bool:
    """Return True if a tensor of the optimizer's state is one number for the whole parameter, such as `step`."""
    return quantity == "step" or (value.dim() == 0 and parameter.dim() > 0)


def restore_state(optimizer: torch.optim.Optimizer, parameter: Tensor, quantity: str, value: Tensor) -> Tensor:
    """Return a saved tensor as the optimizer keeps it for a parameter."""
    if value.shape == parameter.shape and not is_count(quantity, value, parameter):
        # Fused kernels walk memory as it lies, so moments must lie as their parameter does.
        return torch.empty_like(parameter, requires_grad=False, dtype=value.dtype).copy_(value)
    group = optimizer.param_groups[0]
    # Only these kernels count updates on the device.
    on_device = quantity != "step" or group.get("fused") or group.get("capturable")
    return value.to(parameter.device if on_device else "cpu", copy=True)
