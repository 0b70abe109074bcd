"""Which samples each rank evaluates, in batches of one shape, and what metrics are told of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from distgan.config import DataConfig
from distgan.data.index.table import Index
from distgan.data.reader import Reader


class FeatureBatch(NamedTuple):
    """A batch of samples, real or generated, and what the detector sees in them. All but the numbers on the device."""

    numbers: Tensor
    """Shape (n,), int64, on the CPU: of real samples their places in the index, of generated ones their addresses."""
    samples: Tensor
    """Images (n, C, R, R), uint8; characters (n, length), int64; or points (n, d), float."""
    labels: Tensor
    """Shape (n,), int64, of real samples; -1 where there are none, and for generated ones."""
    features: Tensor
    """Shape (n, d), float32; (n, 0) where no metric wants a detector."""
    logits: Tensor
    """Shape (n, k), float32; (n, 0) where no metric wants a detector."""


class Reals(NamedTuple):
    """Real samples with their numbers (n,) int64, and their labels (n,) int64, -1 where there are none."""

    numbers: Tensor
    samples: Tensor
    labels: Tensor


def read_reals(data: DataConfig, index: Index, batches: Iterable[Tensor]) -> Iterator[Reals]:
    """For each batch of sample numbers (n,), those of its samples that can be read, in order and not mirrored.

    Raises UserError when next to nothing can be read.
    """
    with closing(Reader(data, index, seed=0)) as reader:
        for samples in batches:
            batch = reader.read_batch(samples.numpy())
            kept = batch.indices == samples  # the others were replaced
            yield Reals(batch.indices[kept], batch.data[kept], batch.labels[kept])


def rank_batches(total: int, batch_size: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """The numbers i in [0, total) with i mod world_size = rank, in order, in batches of at most batch_size."""
    mine = torch.arange(rank, max(rank, total), world_size)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]


def fill(batch: Tensor, size: int) -> Tensor:
    """A batch of 1 to `size` rows, its rows repeated until there are `size`.

    Kernels choose how they add up by the shape of the batch; with one shape for all, an image has the same features
    whichever rank and batch it falls into.
    """
    return batch if len(batch) == size else batch[torch.arange(size, device=batch.device) % len(batch)]
