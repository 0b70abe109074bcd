"""Differentiable collectives: batch statistics over all ranks, with derivatives of every order.

See `distgan.distributed` for the contract. A backward that passes the gradient through unchanged would miss the
gradients from the other ranks.
`torch.nn.SyncBatchNorm` supports neither CPUs nor second derivatives, which gradient penalties need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks in the default process group; 1 if there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank in the default process group; 0 if there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


Waiting = Callable[[], AbstractContextManager[None]]
_waiting: Waiting = nullcontext


def watch(waiting: Waiting) -> Callable[[], None]:
    """Enter a new context from `waiting` around every all-reduce, to time it. Call the returned function to stop."""
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
        # Differentiable again, because autograd records this call under create_graph.
        return _AllReduceSum.apply(gradient)  # type: ignore[no-any-return]


# Break the graph here. Otherwise torch.compile would recompile the network at each start and end of `watch`.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply_all_reduce_sum(local: Tensor) -> Any:
    return _AllReduceSum.apply(local)


def all_reduce_sum(local: Tensor) -> Tensor:
    """Return the sum over all ranks, differentiable any number of times. Collective: call on every rank."""
    return local if world_size() == 1 else _apply_all_reduce_sum(local)


def all_reduce_mean(local: Tensor) -> Tensor:
    """Return the mean over all ranks, differentiable any number of times. Collective: call on every rank."""
    return all_reduce_sum(local) / world_size()


def all_gather(local: Tensor) -> Tensor:
    """Concatenate the rows (n, ...) of all W ranks to (W n, ...), differentiable any number of times.

    Collective: call on every rank, with equal n. It all-reduces zero-padded rows, which is twice the traffic of an
    all-gather; use it for small tensors. Its backward returns this rank's rows of the summed gradient.
    """
    count = len(local)
    before, after = rank() * count, (world_size() - 1 - rank()) * count
    return all_reduce_sum(F.pad(local, (*(0, 0) * (local.dim() - 1), before, after)))


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of rank 0. Collective: call on every rank with tensors of the same shapes."""
    if world_size() == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.broadcast(flat, src=0)
        for tensor, value in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(value.view_as(tensor))


def at_least_float32(values: Tensor) -> Tensor:
    """Convert to float32, the dtype of statistics and losses. float64 is unchanged."""
    return values if values.dtype == torch.float64 else values.float()


def batch_moments(activations: Tensor, dims: tuple[int, ...], *, synchronized: bool = True) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over `dims` and, if `synchronized`, over all ranks.

    Both are float32 (float64 for float64 input) with the remaining dimensions. All ranks need equal batch sizes.
    Collective if `synchronized`: call on every rank.
    """
    wide = at_least_float32(activations)
    variance, mean = torch.var_mean(wide, dims, correction=0)
    if not synchronized or world_size() == 1:
        return mean, variance
    # One reduction of both moments; float64 makes the cancellation in E[x^2] - E[x]^2 harmless.
    mean64 = mean.double()
    moments = all_reduce_mean(torch.stack((mean64, variance.double() + mean64.square())))
    return moments[0].to(mean.dtype), (moments[1] - moments[0].square()).clamp_min(0).to(mean.dtype)
