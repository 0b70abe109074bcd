"""Parts of tensors: what one rank holds of a sharded tensor, and tensors that are stored in several parts.

A part is a contiguous range of the tensor's elements in row-major order. In training, a sharded tensor is a DTensor
whose rows are divided among ranks, or among the ranks of each of several replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SMALL = 1 << 12
"""Replicated tensors of at most this many bytes are not divided: rank 0 writes them."""


class Part(NamedTuple):
    """What one rank holds of a sharded tensor. Ranks of one replica together hold each element once."""

    values: Tensor
    """The elements, live and not a copy; flat, or rows of the tensor; empty if this rank has none."""
    start: int
    """Row-major index of the first element."""
    shape: torch.Size
    """Shape of the whole tensor."""
    replica: int = 0
    """Number of the replica, of which the first one is written to checkpoints."""


Held = Tensor | Part
"""A tensor that every rank has whole, or this rank's part of it."""


def local_part(tensor: Tensor) -> Held:
    """Return this rank's part of a DTensor. A plain tensor is returned unchanged."""
    if not is_sharded(tensor):
        return tensor
    dtensor: Any = tensor
    mesh, last = dtensor.device_mesh, dtensor.device_mesh.ndim - 1
    assert dtensor.placements[last].is_shard(0), "FSDP2 shards rows"
    assert all(placement.is_replicate() for placement in dtensor.placements[:last])
    # As torch.chunk: all ranks but the last ones have equally many rows.
    rows = -(-len(tensor) // mesh.size(last))
    first = min(rows * mesh.get_local_rank(last), len(tensor))
    replica = mesh.get_local_rank(0) if last else 0
    return Part(local(tensor), first * math.prod(tensor.shape[1:]), tensor.shape, replica)


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # importing it takes most of a second

    return isinstance(tensor, DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, which shares its memory. A plain tensor is returned unchanged."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return shard


def shard_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that all ranks have, as a DTensor divided as `like`."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    divided: Any = like
    # Without a source rank nothing is sent.
    return distribute_tensor(tensor.detach(), divided.device_mesh, divided.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """Gather a DTensor from all ranks. A plain tensor is returned unchanged. Collective: call on every rank."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def shard_network_as(network: nn.Module, like: nn.Module) -> None:
    """Keep this rank's shards of a copy of a sharded network. Pass the copy inputs inside `gathered` only."""
    divided = dict(like.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(network.named_parameters(remove_duplicate=False)):
        if is_sharded(divided[name]):
            shard = nn.Parameter(shard_as(parameter, divided[name]), requires_grad=False)
            _replace(network, name, made.setdefault(id(parameter), shard))


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Give a network whose parameters are shards whole ones inside, without gradients. Collective.

    Do not change them.
    """
    shards = {
        name: parameter for name, parameter in network.named_parameters(remove_duplicate=False) if is_sharded(parameter)
    }
    for name, shard in shards.items():
        _replace(network, name, nn.Parameter(whole(shard), requires_grad=False))
    try:
        yield
    finally:
        for name, shard in shards.items():
            _replace(network, name, shard)


def _replace(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, key = name.rpartition(".")
    network.get_submodule(module)._parameters[key] = parameter


def own_part(held: Held, rank: int, world_size: int) -> Part:
    """Return the part of a tensor that this rank writes to a checkpoint. A whole tensor has its own shape.

    Ranks divide the rows of a large replicated tensor, so that each copies and writes a share of it.
    """
    if isinstance(held, Part):
        if held.replica:
            return held._replace(values=held.values.flatten()[:0])
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
