"""Differentiable reductions over all ranks, for losses, networks and trainers of your own.

Each is its local result in a process without a process group. With one it is a collective: call it on every rank, in
the same order. All have derivatives of every order, on CPUs (gloo) and GPUs (NCCL).

The contract: training minimizes the mean over ranks of the returned losses, and the backward of an all-reduce sum is
the all-reduce sum of the gradients. With gradients averaged over ranks, as DDP does, and equally many samples per rank,
a loss of such reductions has exactly the gradient of one process with the whole batch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgan.distributed.collectives import (
        all_gather,
        all_reduce_mean,
        all_reduce_sum,
        batch_moments,
        rank,
        world_size,
    )

__all__ = ["all_gather", "all_reduce_mean", "all_reduce_sum", "batch_moments", "rank", "world_size"]


def __getattr__(name: str) -> Any:
    # Imports of torch take seconds; modules of this package that need none should not wait for them.
    if name in __all__:
        return getattr(importlib.import_module("distgan.distributed.collectives"), name)
    raise AttributeError(f"module 'distgan.distributed' has no attribute {name!r}")
