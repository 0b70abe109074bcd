"""What the players are fed: reals from the stream, latents and labels by address."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from distgan.data.stream import open_stream
from distgan.data.substitutions import Failure, check_failure_rate
from distgan.distributed.runtime import Runtime
from distgan.generation import from_bytes
from distgan.training.assembly import latent_source, uses_channels_last
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")

Reals = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class Feed:
    """This rank's share of every micro-batch, from the state's stream position on."""

    def __init__(self, state: TrainingState, runtime: Runtime) -> None:
        self.config, self.index, self.progress, self.runtime = state.config, state.index, state.progress, runtime
        self.latents = latent_source(state.config, state.index, runtime.device)
        self.failures: list[Failure] = []
        """Samples this rank could not read and the others do not know of."""
        self.seconds_waited = 0.0
        channels_last = uses_channels_last(state.config, runtime.device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._stream = open_stream(
            state.config.data,
            state.config.seed,
            state.index,
            start=state.progress.position,
            micro_batch=state.config.micro_batch,
            rank=runtime.rank,
            world_size=runtime.world_size,
            substitutions=state.progress.substitutions,
            pin_memory=runtime.device.type == "cuda",
        )

    def discriminator_inputs(self) -> Iterator[Reals]:
        """The micro-batches of a discriminator update: reals and their labels, latents and labels for fakes."""
        device = self.runtime.device
        for _ in range(self.config.training.accumulation):
            started = time.perf_counter()
            batch = next(self._stream)
            self.seconds_waited += time.perf_counter() - started
            self.failures += batch.failures
            reals = from_bytes(batch.values.to(device, non_blocking=True))
            reals = reals.contiguous(memory_format=self._memory_format)
            latents, labels = self.latents.draw("discriminator latents", batch.positions.to(device, non_blocking=True))
            real_labels = batch.labels.to(device, non_blocking=True) if labels is not None else None
            yield reals, real_labels, latents, labels

    def generator_inputs(self, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The micro-batches of a generator update: latents and labels."""
        micro_batch = self.config.micro_batch
        share = micro_batch // self.runtime.world_size
        for number in range(self.config.training.accumulation):
            first = step * self.config.training.batch_size + number * micro_batch + self.runtime.rank * share
            yield self.latents.draw("generator latents", torch.arange(first, first + share, device=self.runtime.device))

    def share_failures(self) -> None:
        """Make what any rank could not read known to all, from the next position on. Every rank calls it.

        Raises:
            UserError: more than `data.max_failure_rate` could not be read.
        """
        for failures in self.runtime.gather_objects(self.failures):
            for failure in failures:
                if self.progress.substitutions.add(failure, self.progress.position) and self.runtime.is_main:
                    logger.warning("unreadable sample replaced: %s", failure.reason)
        self.failures = []
        with self.runtime.together():
            check_failure_rate(
                self.progress.substitutions, self.progress.position, len(self.index), self.config.data.max_failure_rate
            )

    def close(self) -> None:
        """Stop the loader's processes."""
        self._stream.close()
