"""Loader of plain tars for any trainer: the order, the exact resume and the replacements of distgan's runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from distgan.config import DataConfig
from distgan.config.error_messages import explain
from distgan.data.index.loading import load_index
from distgan.data.reader import Batch
from distgan.data.replacements import Failure, Substitutions, record_failures
from distgan.data.stream import Stream, open_rank_stream
from distgan.errors import UserError

_VERSION = 1


class Loader:
    """Endless batches of shuffled samples, of which each rank gets its part. Iterate over it once per epoch.

    ```
    with Loader("datasets/photos", batch_size=256, resolution=64) as loader:
        for epoch in range(10):
            for batch in loader:
                step(batch.data, batch.labels)
    ```

    The state is one stream position: batch i of the run has the same samples for any number of ranks and data loader
    workers, and a loader that loads the state of another continues bitwise where that one was, on any number of ranks.
    Each sample comes once per epoch. A batch may reach into the next epoch; it counts to the one in which it begins.
    Of several sources, mixed by weight, an epoch is as many samples as all of them hold.

    Do not pass it to `accelerate.prepare`, which would send the batches of rank 0 to all ranks.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Mapping[str, Any]],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool = False,
        **settings: Any,
    ) -> None:
        """Read the index and open the stream at position 0.

        Args:
            path: shards or weighted sources, as in `data.path` of a recipe.
            batch_size: samples per batch over all ranks; divisible by the number of ranks.
            rank, world_size: of this process; by default those of torch's default process group, or 0 and 1. Without a
                process group, ranks do not learn of each other's unreadable samples.
            settings: other keys of the section `data`, such as `resolution` (any from 4 up), `channels`, `kind`,
                `mirror`, `order`, `num_workers` or `cache_dir`.

        Raises:
            UserError: a setting is wrong, the shards cannot be read, or the ranks of a launcher do not know each other.
        """
        try:
            if isinstance(path, (str, os.PathLike)):
                named: Any = os.fspath(path)
            else:
                named = [part if isinstance(part, Mapping) else os.fspath(part) for part in path]
            self.config = DataConfig.model_validate({"path": named, **settings})
        except ValidationError as error:
            raise UserError(f"Loader: {explain(error, DataConfig)[1]}") from None
        joined = dist.is_available() and dist.is_initialized()
        if not joined and world_size is None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"Loader: the launcher started {os.environ['WORLD_SIZE']} ranks, but torch.distributed is not "
                "initialized, so that each rank would get all samples; initialize it first, or pass rank and world_size"
            )
        self.rank = rank if rank is not None else dist.get_rank() if joined else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if joined else 1
        if (rank is None) != (world_size is None) or not 0 <= self.rank < self.world_size:
            raise UserError(f"Loader: rank = {rank}, world_size = {world_size}: pass both, with rank below world_size")
        if not isinstance(batch_size, int) or batch_size < 1 or batch_size % self.world_size:
            raise UserError(
                f"Loader: batch_size = {batch_size!r}: expected a multiple of the number of ranks, {self.world_size}"
            )
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise UserError(f"Loader: seed = {seed!r}: expected a whole number from 0 to 2**63 - 1")
        self.batch_size, self.seed, self._pin_memory = batch_size, seed, pin_memory
        self.index = load_index(self.config.path, self.config.cache_dir)
        self.position = 0
        """Stream position of the next batch: the number of samples that all ranks have got so far."""
        self._substitutions = Substitutions()
        self._failures: list[Failure] = []
        self._stream: Stream | None = None

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next batch begins in, from 0."""
        return self.position // len(self.index)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches up to the end of the epoch. Iterate on every rank.

        Raises:
            UserError: more than `max_failure_rate` of the samples cannot be read.
        """
        epoch = self.epoch
        while self.epoch == epoch:
            if self._stream is None:
                self._stream = self._open()
            batch = next(self._stream)
            self.position += self.batch_size
            self._failures += batch.failures
            yield batch
        self._share_failures()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, the same on every rank after the same number of batches. Not collective."""
        return {
            "version": _VERSION,
            "position": self.position,
            "seed": self.seed,
            "fingerprint": self.index.fingerprint,
            "substitutions": self._substitutions.to_json(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. The number of ranks and the batch size may be others.

        Raises:
            UserError: the state is of other data, of another seed, or damaged.
        """
        if not isinstance(state, dict):
            raise UserError(f"Loader: found a state of type {type(state).__name__}, expected that of state_dict()")
        for key, own in (("version", _VERSION), ("seed", self.seed), ("fingerprint", self.index.fingerprint)):
            if state.get(key) != own:
                raise UserError(f"Loader: {key} of the state: found {state.get(key)!r}, expected {own!r}")
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < 2**62:
            raise UserError(f"Loader: position of the state: found {position!r}, expected a number from 0")
        substitutions = Substitutions.from_json(state.get("substitutions"), len(self.index))
        self.close()
        self.position, self._substitutions, self._failures = position, substitutions, []

    def close(self) -> None:
        """Stop the data loader workers and close all files. Iterating opens them again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Stream:
        return open_rank_stream(
            self.config,
            self.seed,
            self.index,
            start=self.position,
            micro_batch=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            substitutions=self._substitutions,
            pin_memory=self._pin_memory,
        )

    def _share_failures(self) -> None:
        """Tell all ranks which samples were replaced, so that all replace them alike from here on."""
        everyones: list[list[Failure]] = [self._failures]
        if self.world_size > 1 and dist.is_available() and dist.is_initialized():
            everyones = [[] for _ in range(self.world_size)]
            dist.all_gather_object(everyones, self._failures)
        self._failures = []
        limit, main = self.config.max_failure_rate, self.rank == 0
        record_failures(self._substitutions, everyones, self.position, len(self.index), limit, main=main)
