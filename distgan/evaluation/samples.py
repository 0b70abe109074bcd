"""Split of the samples over ranks and batches of one shape, and the input of metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from distgan.config import DataConfig
from distgan.data.index.table import Index
from distgan.data.reader import Reader


class FeatureBatch(NamedTuple):
    """Batch of real or generated samples with detector outputs. All but the numbers are on the device."""

    numbers: Tensor
    """Shape (n,), int64, on the CPU: indices of real samples, or addresses of generated ones."""
    samples: Tensor
    """Images (n, C, R, R), uint8; characters (n, length), int64; points (n, d), float; or latents (n, C, R, R), float,
    as the autoencoder makes them."""
    labels: Tensor
    """Shape (n,), int64; -1 for generated samples and real samples without labels."""
    features: Tensor
    """Shape (n, d), float32; (n, 0) where no metric wants a detector."""
    logits: Tensor
    """Shape (n, k), float32; (n, 0) where no metric wants a detector."""

    def first(self, count: int) -> FeatureBatch:
        """Return the samples whose numbers, which increase, are below `count`."""
        kept = int((self.numbers < count).sum())
        return self if kept == len(self.numbers) else FeatureBatch(*(part[:kept] for part in self))


class Reals(NamedTuple):
    """Real samples with their numbers (n,) int64, and their labels (n,) int64, -1 without labels."""

    numbers: Tensor
    samples: Tensor
    labels: Tensor


class SampleSet(Index, ABC):
    """Samples that are not members of shards. It has of an index what evaluation asks for, and reads them itself."""

    @abstractmethod
    def read(self, data: DataConfig, batches: Iterable[Tensor]) -> Iterator[Reals]:
        """Yield the readable samples of each batch of sample numbers (n,), in order."""


def read_reals(data: DataConfig, index: Index, batches: Iterable[Tensor]) -> Iterator[Reals]:
    """Yield the readable samples of each batch of sample numbers (n,), in order and not mirrored.

    Raises UserError if almost no sample can be read.
    """
    if isinstance(index, SampleSet):
        yield from index.read(data, batches)
        return
    with closing(Reader(data, index, seed=0)) as reader:
        for samples in batches:
            batch = reader.read_batch(samples.numpy())
            kept = batch.indices == samples  # the others were replaced
            yield Reals(batch.indices[kept], batch.data[kept], batch.labels[kept])


def rank_batches(total: int, batch_size: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """Yield the i in [0, total) with i mod world_size = rank, in order, in batches of at most batch_size."""
    mine = torch.arange(rank, max(rank, total), world_size)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]


def pad_batch(batch: Tensor, size: int) -> Tensor:
    """Repeat the rows of a batch of 1 to `size` rows until there are `size`.

    Kernels choose their order of summation by the batch shape. With one shape, an image has the same features in any
    batch and on any rank.
    """
    return batch if len(batch) == size else batch[torch.arange(size, device=batch.device) % len(batch)]
