"""Stream real samples: endless batches for one rank, equal for any number of data loader workers."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from distgan.config import DataConfig
from distgan.data.index.table import Index
from distgan.data.kinds.decoding import Values, sample_format
from distgan.data.loader_processes import start_worker, start_worker_server
from distgan.data.mixture import Integers
from distgan.data.order import Order, assign, make_order
from distgan.data.reader import Batch, Decoded, Reader, as_batch
from distgan.data.replacements import Substitutions
from distgan.data.shared_buffers import SampleBuffers
from distgan.data.storage.prefetch import Prefetcher, check_capacity, processes_on_node
from distgan.data.storage.shard_cache import ShardCache
from distgan.errors import UserError
from distgan.randomness import uniform

_POSITIONS_AT_ONCE = 8192
_STOP_SECONDS = 2.0


class Request(NamedTuple):
    """Samples to read with their positions and mirror flags, each of shape (n,), and the slot to decode into."""

    samples: Integers
    positions: Integers
    mirrored: NDArray[np.bool_]
    slot: int
    """Of the shared buffers."""


class SampleDataset(Dataset[Decoded]):
    """A map-style dataset over requests. Writes decoded samples to `buffers` and returns the rest.

    Returns a UserError instead of raising it, because the DataLoader would wrap it in the worker's traceback. For the
    same reason, a worker opens the index only when it reads.
    """

    def __init__(self, config: DataConfig, index: Index, seed: int, buffers: SampleBuffers) -> None:
        self._config, self._seed, self._buffers = config, seed, buffers
        self._length = len(index)
        self._open_index: Callable[[], Index] = lambda: index
        self._reader: Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        reopen, arguments = self._open_index().__reduce__()
        return self.__dict__ | {"_reader": None, "_open_index": partial(reopen, *arguments)}

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, request: Request) -> Decoded | UserError:
        try:
            return self.read(request, self._buffers[request.slot][: len(request.samples)])
        except UserError as error:
            return error

    def read(self, request: Request, out: Values) -> Decoded:
        """Read samples into `out` with this process's reader; see `Reader.read`."""
        if self._reader is None:
            self._reader = Reader(self._config, self._open_index(), self._seed)
        return self._reader.read(request.samples, out, request.mirrored, request.positions)

    def close(self) -> None:
        """Close this process's files."""
        if self._reader is not None:
            self._reader.close()


def open_rank_stream(
    config: DataConfig,
    seed: int,
    index: Index,
    *,
    start: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    sizes: Callable[[], Iterator[int]] | None = None,
    substitutions: Substitutions | None = None,
    pin_memory: bool = False,
) -> Stream:
    """Open an endless stream of this rank's part of the micro-batches from position `start`.

    Args:
        micro_batch: positions per micro-batch over all ranks; divisible by `world_size`.
        sizes: an endless iterator of the micro-batches' positions, if they differ; at most `micro_batch`.
        substitutions: the run's replacements. They may grow while the stream is open, and every later batch follows
            them, even if a worker read it before.
        pin_memory: return batches in pinned memory.

    Raises:
        UserError: the cache cannot hold the shards that the order reads at once, or the kind of the shards differs
            from the config.
    """
    check_capacity(config, index, world_size)
    return Stream(
        _Share(
            make_order(config, seed, index),
            start,
            micro_batch,
            sizes or partial(itertools.repeat, micro_batch),
            rank,
            world_size,
            seed if config.mirror else None,
        ),
        seed,
        config,
        index,
        substitutions if substitutions is not None else Substitutions(),
        pin_memory,
    )


class _Chunk(NamedTuple):
    """One rank's part of many consecutive micro-batches; each array has shape (n,)."""

    end: int
    """First position after the chunk."""
    cuts: list[int]
    """Starts in the arrays of all micro-batches but the first."""
    positions: Integers
    samples: Integers
    mirrored: NDArray[np.bool_]


class _Share:
    """The samples that one rank reads, computed for many micro-batches at a time."""

    def __init__(
        self,
        order: Order,
        start: int,
        micro_batch: int,
        sizes: Callable[[], Iterator[int]],
        rank: int,
        world_size: int,
        mirror_seed: int | None,
    ) -> None:
        assert micro_batch % world_size == 0
        self._order, self._start, self._sizes = order, start, sizes
        self._rank, self._world_size, self._mirror_seed = rank, world_size, mirror_seed
        self._at_once = max(1, _POSITIONS_AT_ONCE // micro_batch)
        self.batch_size = micro_batch // world_size
        """Samples of this rank in a micro-batch, at most."""

    def chunks(self) -> Iterator[_Chunk]:
        """Yield this rank's chunks from the start position, without end."""
        sizes, end = self._sizes(), self._start
        while True:
            parts = []
            for size in itertools.islice(sizes, self._at_once):
                assert size % self._world_size == 0
                parts.append(assign(self._order, np.arange(end, end + size), self._world_size)[self._rank])
                end += size
            positions = np.concatenate(parts)
            mirrored = np.zeros(positions.shape, np.bool_)
            if self._mirror_seed is not None:
                mirrored = (uniform(self._mirror_seed, "data/mirror", torch.from_numpy(positions)) < 0.5).numpy()
            cuts = np.cumsum([len(part) for part in parts])[:-1].tolist()
            yield _Chunk(end, cuts, positions, self._order.samples(positions), mirrored)


class _Requested(NamedTuple):
    """A pending batch: the samples at its positions, and the number of substitutions known when it was requested."""

    positions: Integers
    samples: Integers
    mirrored: NDArray[np.bool_]
    slot: int
    known: int


class Stream(Iterator[Batch]):
    """An open stream of batches, created by `open_rank_stream`. Close it to end its data loader workers."""

    def __init__(
        self,
        share: _Share,
        seed: int,
        config: DataConfig,
        index: Index,
        substitutions: Substitutions,
        pin_memory: bool,
    ) -> None:
        self._share, self._index, self._substitutions, self._pin_memory = share, index, substitutions, pin_memory
        context = start_worker_server() if config.num_workers else multiprocessing.get_context("forkserver")
        # One slot per pending request, and one for the batch that is copied out while the next request is pending.
        slots = config.num_workers * config.prefetch + 1
        self._format = sample_format(config, index)
        shape = (share.batch_size, *self._format.shape)
        self._buffers = SampleBuffers(context, slots, self._format.dtype, shape)
        self._dataset = SampleDataset(config, index, seed, self._buffers)
        self._requested: deque[_Requested] = deque()
        self._prefetcher: Prefetcher | None = None
        if index.any_remote:
            chunks = ((chunk.end, chunk.samples) for chunk in share.chunks())
            budget = int(config.cache_gigabytes * 1e9) // processes_on_node()
            self._prefetcher = Prefetcher(ShardCache.of(config), index, chunks, budget)
        others = set(multiprocessing.active_children())
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=self._requests(),  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=config.num_workers,
            prefetch_factor=config.prefetch if config.num_workers else None,
            multiprocessing_context=context if config.num_workers else None,
            worker_init_fn=partial(start_worker, environment=dict(os.environ)),
            generator=torch.Generator(),  # without it, the loader draws from torch's default generator
        )
        self._batches: Iterator[Any] | None = iter(loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in others]
        atexit.register(self.close)

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        decoded: Decoded | UserError = next(self._batches)
        request = self._requested.popleft()
        if isinstance(decoded, UserError):
            raise decoded
        written = self._buffers[request.slot][: len(request.positions)]
        values = self._format.empty(len(written), pin_memory=self._pin_memory)
        # Tensor.copy_ threads spin when cores are busy: 25 us per 32-pixel image instead of 0.25.
        np.copyto(values.numpy(), written)
        if request.known != len(self._substitutions):
            decoded = self._bring_up_to_date(decoded, values.numpy(), request)
        if self._prefetcher is not None:
            self._prefetcher.advance(int(request.positions.max()))
        failures = [failure for failure in decoded.failures if failure.sample not in self._substitutions]
        values = self._format.as_values(values)
        return as_batch(self._index, decoded._replace(failures=failures), values, request.positions)

    def close(self) -> None:
        """End the data loader workers and close all files."""
        atexit.unregister(self.close)
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._batches = None  # deleting the iterator asks its workers to stop
        for worker in self._workers:
            worker.join(_STOP_SECONDS)
            if worker.is_alive():
                worker.kill()
        self._workers = []
        self._dataset.close()

    def _requests(self) -> Iterator[Request]:
        slots = itertools.cycle(range(self._buffers.slots))
        for chunk in self._share.chunks():
            parts = (np.split(array, chunk.cuts) for array in (chunk.positions, chunk.samples, chunk.mirrored))
            for positions, samples, mirrored in zip(*parts, strict=True):
                slot = next(slots)
                self._requested.append(_Requested(positions, samples, mirrored, slot, len(self._substitutions)))
                yield Request(self._substitutions.apply(samples, positions), positions, mirrored, slot)

    def _bring_up_to_date(self, decoded: Decoded, values: Values, request: _Requested) -> Decoded:
        """Read samples again, in place, that were replaced after this batch was requested."""
        wanted = self._substitutions.apply(request.samples, request.positions)
        stale = np.flatnonzero((wanted != request.samples) & (wanted != decoded.indices))
        if not len(stale):
            return decoded
        again = np.empty_like(values[stale])
        part = Request(wanted[stale], request.positions[stale], request.mirrored[stale], request.slot)
        fresh = self._dataset.read(part, again)
        values[stale] = again
        decoded.indices[stale] = fresh.indices
        for place, others in zip(stale.tolist(), fresh.others, strict=False):  # there are none without stages
            decoded.others[place] = others
        return decoded._replace(failures=decoded.failures + fresh.failures)


def _as_it_is(batch: Any) -> Any:
    return batch
