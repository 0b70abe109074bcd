"""Parts of tensors: what one rank holds of a sharded tensor, and tensors that are stored in several parts.

A part is a contiguous range of the tensor's elements in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

_SMALL = 1 << 12
"""Replicated tensors of at most this many bytes are not divided: rank 0 writes them."""


class Part(NamedTuple):
    """What one rank holds of a sharded tensor. Ranks together hold each element once."""

    values: Tensor
    """The elements, live and not a copy; flat, or rows of the tensor; empty if this rank has none."""
    start: int
    """Row-major index of the first element."""
    shape: torch.Size
    """Shape of the whole tensor."""


Held = Tensor | Part
"""A tensor that every rank has whole, or this rank's part of it."""


def local_part(tensor: Tensor) -> Held:
    """Return this rank's part of a DTensor. A plain tensor is returned unchanged."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Shard  # importing it takes most of a second

    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor.placements == (Shard(0),), "FSDP2 shards rows over one dimension of ranks"
    with torch.no_grad():
        values = tensor.to_local()
    # As torch.chunk: all ranks but the last ones have equally many rows.
    rows = -(-len(tensor) // tensor.device_mesh.size())
    first = min(rows * tensor.device_mesh.get_local_rank(), len(tensor))
    return Part(values, first * math.prod(tensor.shape[1:]), tensor.shape)


def own_part(held: Held, rank: int, world_size: int) -> Part:
    """Return the part of a tensor that this rank writes to a checkpoint. A whole tensor has its own shape.

    Ranks divide the rows of a large replicated tensor, so that each copies and writes a share of it.
    """
    if isinstance(held, Part):
        is_whole = held.values.numel() == held.shape.numel()
        return held._replace(values=held.values.view(held.shape)) if is_whole else held
    if held.nbytes <= _SMALL or held.dim() == 0:
        return Part(held if rank == 0 else held.flatten()[:0], 0, held.shape)
    rows = -(-len(held) // world_size)
    first = min(rows * rank, len(held))
    return Part(held[first : first + rows], first * math.prod(held.shape[1:]), held.shape)


class Stored:
    """A tensor that is stored in parts, such as in memory-mapped files.

    Args:
        parts: first element and elements of each part, in order and without gaps.
    """

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], parts: Sequence[tuple[int, Tensor]]) -> None:
        self.dtype, self.shape = dtype, torch.Size(shape)
        self._parts = parts

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """Return a tensor in memory as one that is stored in one part."""
        return cls(tensor.dtype, tensor.shape, [(0, tensor.detach())])

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def elements(self, start: int, stop: int) -> Tensor:
        """Copy the elements `start` to `stop` to new memory, shape (stop - start,), on the CPU."""
        found = torch.empty(stop - start, dtype=self.dtype)
        for first, values in self._parts:
            begin, end = max(first, start), min(first + values.numel(), stop)
            if begin < end:
                found[begin - start : end - start] = values.reshape(-1)[begin - first : end - first]
        return found

    def whole(self) -> Tensor:
        """Copy the whole tensor to new memory on the CPU."""
        return self.elements(0, self.shape.numel()).view(self.shape)


@torch.no_grad()
def load_parts(targets: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Copy stored tensors of the same names and shapes into tensors, of which DTensors get this rank's part only."""
    for name, target in targets.items():
        held = local_part(target)
        part = held if isinstance(held, Part) else Part(held, 0, held.shape)
        found = stored[name].elements(part.start, part.start + part.values.numel())
        part.values.copy_(found.view(part.values.shape))
