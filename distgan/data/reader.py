"""Read samples by index: one `pread` of tar header and data per sample, checked and decoded into the batch."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distgan.config import DataConfig
from distgan.data.index.table import EXTENSIONS, OTHER, Index
from distgan.data.kinds.decoding import Values, sample_format
from distgan.data.order import mix
from distgan.data.replacements import Failure
from distgan.data.stages import Members, Stages, select_members
from distgan.data.storage.locations import is_remote
from distgan.data.storage.shard_cache import ShardCache
from distgan.data.storage.tar import BLOCK
from distgan.errors import UnreadableSampleError, UserError, printable
from distgan.files import DiskError
from distgan.randomness import derive_key, words

_MAX_OPEN_FILES = 128
_MAX_CANDIDATES = 32
_FIRST_BACKOFF_SECONDS = 0.5
_OUTAGE_SECONDS = 60.0
_SEED_STEP = 0x9E3779B9
_DIFFERS = "the shard differs from its index; run `distgan index` again"


class Batch(NamedTuple):
    """Samples of a micro-batch, or of one rank's part of it."""

    data: Tensor
    """Images: uint8, (n, channels, resolution, resolution), dense, channels-last in memory. Text: indices into the
    index's vocabulary, uint16, (n, length). Points: float32, (n, dimensions). Moments of latents: float32, (n, 2
    channels, resolution, resolution), or latents: (n, channels, resolution, resolution).
    """
    labels: Tensor
    """int64, (n,): class labels, -1 for unlabeled samples."""
    positions: Tensor
    """int64, (n,): positions in the stream."""
    indices: Tensor
    """int64, (n,): positions of the samples in the index."""
    failures: list[Failure]
    """Samples that could not be read and were replaced."""
    others: list[tuple[Any, ...]]
    """Per sample, what `data.stages` made beside its data; empty without stages."""


class Decoded(NamedTuple):
    """Indices of the samples that were decoded, and the failed reads."""

    indices: NDArray[np.int64]
    failures: list[Failure]
    others: list[tuple[Any, ...]]
    """See `Batch.others`."""


def as_batch(index: Index, decoded: Decoded, values: Tensor, positions: NDArray[np.int64]) -> Batch:
    """Build a batch from `values` in the shape of `Batch.data`."""
    labels = torch.from_numpy(index.labels[decoded.indices].astype(np.int64))
    samples, places = torch.from_numpy(decoded.indices), torch.from_numpy(positions)
    return Batch(values, labels, places, samples, decoded.failures, decoded.others)


def read_samples(config: DataConfig, index: Index, samples: Sequence[int] | NDArray[np.int64] | Tensor) -> Batch:
    """Read samples by index for evaluation, decoded as for training but not mirrored. `positions` are the indices."""
    with contextlib.closing(Reader(config, index, seed=0)) as reader:
        return reader.read_batch(np.array(samples.numpy() if isinstance(samples, Tensor) else samples, np.int64))


class Reader:
    """Read and decode samples with a bounded number of open files. Each process needs its own reader.

    Retries an OSError `data.retries` times, after 0.5 s, 1 s, 2 s and so on. Does not retry a sample that cannot be
    decoded or differs from the index. If the sample stays unreadable, the first readable replacement takes its place.
    A hash of seed, sample and attempt chooses the candidates.
    """

    def __init__(self, config: DataConfig, index: Index, seed: int) -> None:
        """Create a reader. Raises UserError if the kind of the shards differs from the config."""
        self.format = sample_format(config, index)
        self._stages = Stages(config, self.format) if config.stages is not None else None
        self._config, self._index, self._seed = config, index, seed
        self._files: OrderedDict[int, int] = OrderedDict()
        self._cache = ShardCache.of(config) if index.any_remote else None
        self._failures: dict[int, Failure] = {}
        self._failed_at: dict[int, float] = {}

    def close(self) -> None:
        """Close all files. The reader stays usable."""
        while self._files:
            os.close(self._files.popitem()[1])

    def read(
        self,
        samples: NDArray[np.int64],
        out: Values,
        mirrored: NDArray[np.bool_] | None = None,
        positions: NDArray[np.int64] | None = None,
    ) -> Decoded:
        """Read samples by index into `out`, and mirror them left-right where `mirrored` is True.

        Args:
            samples: int64 (n,).
            positions: int64 (n,), stream positions, on which the random numbers of `data.stages` depend. None: those of
                evaluation, which depend on the samples.
            out: format.dtype, (n, *format.shape).
            mirrored: bool (n,).

        Raises:
            UserError: replacements cannot be read either, or the cache's disk cannot hold a shard.
        """
        read = samples.copy()
        others: list[tuple[Any, ...]] = []
        if self._stages is None:
            failures = self._avoid_known(read) + self._read_plain(read, out, mirrored)
        else:
            failures, others = self._read_staged(read, out, positions if positions is not None else samples)
        if self._index.any_remote:
            self.close()  # an evicted shard occupies the disk while it is open
        if mirrored is not None and mirrored.any() and self.format.decode_mirrored_into is None:
            if any(others):
                raise UserError(
                    "data.mirror = true: flips the first value that data.stages makes of a sample, but not the others; "
                    "set it to false, and flip all of them in the stages"
                )
            out[mirrored] = out[mirrored, :, ::-1]
        return Decoded(read, failures, others)

    def _read_plain(self, read: NDArray[np.int64], out: Values, mirrored: NDArray[np.bool_] | None) -> list[Failure]:
        """Decode one member per sample. Replace the samples that cannot be read, in place."""
        index = self._index
        flips = np.zeros(len(read), np.bool_) if mirrored is None else mirrored
        failures: list[Failure] = []
        where = (index.shard_of(read), index.offsets[read], index.sizes[read], index.header_crcs[read])
        extensions = [EXTENSIONS[number] for number in index.extensions[read]]
        for slot, entry in enumerate(zip(*(column.tolist() for column in where), extensions, strict=True)):
            try:
                self._decode(out[slot], *entry, mirrored=bool(flips[slot]))
            except (OSError, UnreadableSampleError) as error:
                failure, _ = self._recover(int(read[slot]), out[slot], error, mirrored=bool(flips[slot]))
                if failure is not None:
                    read[slot] = failure.replacement
                    failures.append(failure)
        return failures

    def _read_staged(
        self, read: NDArray[np.int64], out: Values, positions: NDArray[np.int64]
    ) -> tuple[list[Failure], list[tuple[Any, ...]]]:
        """Run the stages over all samples, or over each alone if they fail. Replace those that fail, in place.

        Whether a sample fails, and what replaces it, depends on its position and not on what this process read before:
        random numbers of the stages may decide it. Return the failures and, per sample, what the stages made beside its
        data.
        """
        assert self._stages is not None
        seeds = words(self._seed, "data/stages", torch.from_numpy(positions), 1)[:, 0].tolist()
        try:
            staged = self._stages([self._members(sample) for sample in read.tolist()], seeds)
            for slot, one in enumerate(staged):
                with blaming_sample(self._index, read[slot]):
                    self._stages.put(out[slot], one.data)
            return [], [one.others for one in staged]
        except (OSError, UnreadableSampleError):
            pass
        failures, others = [], []
        for slot, (sample, seed) in enumerate(zip(read.tolist(), seeds, strict=True)):
            try:
                others.append(self._decode_sample(out[slot], sample, seed))
            except (OSError, UnreadableSampleError) as error:
                failure, found = self._recover(sample, out[slot], error, seed)
                others.append(found)
                if failure is not None:
                    read[slot] = failure.replacement
                    failures.append(failure)
        return failures, others

    def read_batch(self, samples: NDArray[np.int64]) -> Batch:
        """Read samples by index, int64 (n,), into a new batch. Its `positions` are the indices."""
        values = self.format.empty(len(samples))
        return as_batch(self._index, self.read(samples, values.numpy()), self.format.as_values(values), samples)

    def _avoid_known(self, read: NDArray[np.int64]) -> list[Failure]:
        """Replace samples that failed before, in place, so that each bad file costs its retries only once."""
        if not self._failures:
            return []
        known = [
            (slot, self._failures[sample]) for slot, sample in enumerate(read.tolist()) if sample in self._failures
        ]
        for slot, failure in known:
            read[slot] = failure.replacement
        return [failure for _, failure in known]

    def _decode(
        self, out: Values, shard: int, offset: int, size: int, crc: int, extension: str, *, mirrored: bool = False
    ) -> None:
        """Decode one sample. Raises OSError if reading fails, UnreadableSampleError if the data are invalid."""
        data = self._content(shard, offset, size, crc)
        decode = self.format.decode_mirrored_into if mirrored else None
        (decode or self.format.decode_into)(out, data, extension)

    def read_file(self, sample: int) -> tuple[bytes, str]:
        """Return the file of a sample as it is, and its extension. Raises as `_decode`."""
        *where, extension = self._index.entry(sample)
        return bytes(self._content(*where)), extension

    def _content(self, shard: int, offset: int, size: int, crc: int) -> memoryview:
        self._check_size(size)
        data = memoryview(os.pread(self._descriptor(shard), size + BLOCK, offset - BLOCK))
        if len(data) != size + BLOCK or zlib.crc32(data[:BLOCK]) != crc:
            raise UnreadableSampleError(_DIFFERS)
        return data[BLOCK:]

    def _decode_sample(self, out: Values, sample: int, seed: int, *, mirrored: bool = False) -> tuple[Any, ...]:
        """Decode one sample as `_decode` does, or by the stages. Return what these made beside its data."""
        if self._stages is None:
            self._decode(out, *self._index.entry(sample), mirrored=mirrored)
            return ()
        with blaming_sample(self._index, sample):
            [staged] = self._stages([self._members(sample)], [seed])
            self._stages.put(out, staged.data)
        return staged.others

    def _members(self, sample: int) -> Members:
        """Read the members of a sample that the stages declare, or its one member if they declare none."""
        assert self._stages is not None
        shard, offset, _, crc, extension = self._index.entry(sample)
        start, size = self._index.span(sample)
        self._check_size(size)
        span = memoryview(os.pread(self._descriptor(shard), size, start))
        header = span[max(0, offset - BLOCK - start) : max(0, offset - start)]  # empty if the sample is a hard link
        if len(span) != size or (len(header) and zlib.crc32(header) != crc):
            raise UnreadableSampleError(_DIFFERS)
        name, declared = self._index.shard_name(shard), self._stages.members or (extension,)
        if extension == OTHER and not self._stages.members:
            raise UserError(
                f"{self._stages.name}: has no attribute `members`, and the shards hold {self._index.kind}; set it to "
                'the extensions that the stages read, such as ("tif",)'
            )
        members = select_members(span, self._index.key_bytes(sample), declared, name)
        return {"__key__": self._index.key(sample), "__url__": name, **members}

    def _check_size(self, size: int) -> None:
        if size > self._config.max_bytes:
            raise UnreadableSampleError(
                f"sample too large: found {size:,} bytes, expected at most data.max_bytes={self._config.max_bytes:,}"
            )

    def _descriptor(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is not None:
            self._files.move_to_end(shard)
            return descriptor
        while len(self._files) >= _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        url = self._index.shards[shard].url
        if self._cache is not None and is_remote(url):
            descriptor = self._cache.open(self._index.shards[shard])
        else:
            descriptor = os.open(url, os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        return descriptor

    def _recover(
        self, sample: int, out: Values, error: Exception, seed: int = 0, *, mirrored: bool = False
    ) -> tuple[Failure | None, tuple[Any, ...]]:
        """Retry a failed read, then read a replacement.

        Return the failure, None if a retry succeeds, and what the stages made beside the data.

        Args:
            seed: of the stages' random numbers. Each replacement gets another one, because a draw may be the reason.
        """
        shard = int(self._index.shard_of(np.array([sample]))[0])
        for attempt in range(self._retries(shard)):
            if isinstance(error, UnreadableSampleError):
                break
            time.sleep(_FIRST_BACKOFF_SECONDS * 2**attempt)
            try:
                return None, self._decode_sample(out, sample, seed, mirrored=mirrored)
            except (OSError, UnreadableSampleError) as again:
                error = again
        if isinstance(error, DiskError):
            raise UserError(f"{self._index.name(sample)}: cannot cache this shard: {error}; or set data.cache_dir")
        if isinstance(error, OSError):
            self._failed_at[shard] = time.monotonic()
        reason = f"{self._index.name(sample)}: {_describe(error)}"
        for attempt, candidate in enumerate(replacements(self._seed, sample, self._index.peers(sample)), 1):
            if candidate in self._failures:
                continue
            try:
                own_seed = (seed + attempt * _SEED_STEP) % 2**32
                others = self._decode_sample(out, candidate, own_seed, mirrored=mirrored)
            except (OSError, UnreadableSampleError):
                continue
            failure = Failure(sample, candidate, reason, self._stages is None or isinstance(error, OSError))
            if self._stages is None:
                self._failures[sample] = failure
            return failure, others
        fix = "check that the shards exist"
        if self._stages is not None:
            got = " and ".join(f".{name}" for name in self._stages.members) or "the main member alone"
            fix = f"check {self._stages.name}, which gets {got}: its attribute `members` names what it gets"
        raise UserError(f"{reason}; {_MAX_CANDIDATES} other samples cannot be read either; {fix}")

    def _retries(self, shard: int) -> int:
        """Return the number of retries: 0 for a shard that failed recently, so that a lost shard costs seconds once."""
        failed_at = self._failed_at.get(shard)
        if failed_at is not None and time.monotonic() - failed_at < _OUTAGE_SECONDS:
            return 0
        return self._config.retries


@contextlib.contextmanager
def blaming_sample(index: Index, sample: int) -> Iterator[None]:
    """Context manager that prefixes the message of a UserError with the shard and key of a sample."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{index.name(int(sample))}: {error}") from None


def replacements(seed: int, sample: int, peers: range) -> list[int]:
    """Return the samples to try in place of an unreadable one, in order, without itself. `peers` are the choice."""
    key = derive_key(seed, f"data/replacement/{sample}")
    attempts = np.arange(_MAX_CANDIDATES, dtype=np.uint64) + np.uint64(key >> 1)
    candidates = (peers.start + (mix(attempts) % np.uint64(len(peers))).astype(np.int64)).tolist()
    return [candidate for candidate in dict.fromkeys(candidates) if candidate != sample]


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(" ".join(str(error).split())) or type(error).__name__
