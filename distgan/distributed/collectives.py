"""Differentiable collectives: batch statistics over all ranks, with derivatives of every order.

The contract: what is optimized is the mean over ranks of the losses they return, and the backward of a sum over ranks
is a sum over ranks. Gradient averaging (DDP) then gives exactly the gradient that one process with the whole batch
would compute; a backward that passes the gradient through unchanged would be off by the number of ranks.
`torch.nn.SyncBatchNorm` has neither a CPU path nor a second derivative, which gradient penalties need.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Ranks of the default process group; 1 when there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default process group; 0 when there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


Waiting = Callable[[], AbstractContextManager[None]]
_waiting: Waiting = nullcontext


def watch(waiting: Waiting) -> Callable[[], None]:
    """Have a context entered around every reduction, by whoever measures them. Call what is returned to end that."""
    global _waiting
    _waiting = waiting

    def end() -> None:
        global _waiting
        _waiting = nullcontext

    return end


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.detach().clone(memory_format=torch.contiguous_format)
        with _waiting():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Differentiable in its turn, because autograd records this call under create_graph.
        return _AllReduceSum.apply(gradient)  # type: ignore[no-any-return]


# A compiled network is cut in two here: traced, it would be compiled anew whenever someone watches, or no longer does.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply_all_reduce_sum(local: Tensor) -> Any:
    return _AllReduceSum.apply(local)


def all_reduce_sum(local: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, differentiable any number of times. Every rank must call it."""
    return local if world_size() == 1 else _apply_all_reduce_sum(local)


def all_reduce_mean(local: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, differentiable any number of times. Every rank must call it."""
    return all_reduce_sum(local) / world_size()


def all_gather(local: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks in their order, (W n, ...), differentiable any number of times.

    Every rank must call it, with equally many rows. It sums rows that are padded with zeros: for small ones, because
    that is twice the traffic of a plain all-gather; its backward is this rank's part of the sum of all gradients.
    """
    count = len(local)
    before, after = rank() * count, (world_size() - 1 - rank()) * count
    return all_reduce_sum(F.pad(local, (*(0, 0) * (local.dim() - 1), before, after)))


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, in which statistics and losses are made; float64 stays as it is."""
    return values if values.dtype == torch.float64 else values.float()


def batch_moments(activations: Tensor, dims: tuple[int, ...], *, synchronized: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dims` and, if `synchronized`, over all ranks (whose batches are equally large).

    Returns two float32 (float64 for float64 input) tensors of the remaining dimensions.
    """
    wide = at_least_float32(activations)
    variance, mean = torch.var_mean(wide, dims, correction=0)
    if not synchronized or world_size() == 1:
        return mean, variance
    # One reduction of both moments; float64 makes the cancellation in E[x^2] - E[x]^2 harmless.
    mean64 = mean.double()
    moments = all_reduce_mean(torch.stack((mean64, variance.double() + mean64.square())))
    return moments[0].to(mean.dtype), (moments[1] - moments[0].square()).clamp_min(0).to(mean.dtype)
