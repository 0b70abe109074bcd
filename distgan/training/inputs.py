"""Inputs of both players: reals from the stream, and addressed latents and labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from distgan import schedule
from distgan.autoencoders.decoding import images_of_latents
from distgan.data.reader import Batch
from distgan.data.replacements import Failure, record_failures
from distgan.data.stream import Stream, open_rank_stream
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.inference.generation import to_network
from distgan.inference.latents import LatentPrefetcher
from distgan.networks.progressive import fade_reals, shrink
from distgan.players.samples import MicroBatch, RealImages
from distgan.training.setup import evaluation_source, latent_source, uses_channels_last
from distgan.training.state import TrainingState

Drawn = tuple[Tensor, Tensor, Tensor | None]
"""Addresses, latents and labels of one rank's part of a micro-batch; see `LatentPrefetcher.take`."""


class Feed:
    """Iterates over this rank's part of every micro-batch, starting at the state's stream position."""

    def __init__(self, state: TrainingState, runtime: Runtime) -> None:
        self.state, self.config, self.progress, self.runtime = state, state.config, state.progress, runtime
        self.latents = evaluation_source(state.config, state.index, runtime.device)
        """Latents of evaluations and sample grids, or images that an autoencoder reconstructs there."""
        self._training_latents = latent_source(state.config, state.index, runtime.device, seed=state.seed)
        self.failures: list[Failure] = []
        """Samples that this rank could not read and has not yet reported to the other ranks."""
        self.seconds_waited = 0.0
        channels_last = uses_channels_last(state.config, runtime.device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._last_batches: list[Batch] = []
        self._last_latents: list[Drawn] = []
        self._sources = [(self.config.data, state.index)]
        """What is read: the reals, and the images that they are the latents of if the objective looks at these."""
        if self.config.reads_images:
            with runtime.raise_on_all_ranks():
                self._sources.append(images_of_latents(self.config, state.index))
        self._open(state.progress.position, state.progress.images)

    def _open(self, start: int, images: int) -> None:
        """Open the stream at position `start` for the micro-batches of the next step, after `images` images."""
        config = self.config
        accumulation, world_size = config.training.accumulation, self.runtime.world_size
        self.micro_batches = {
            "discriminator": schedule.micro_batch(config, images),
            "generator": schedule.generator_micro_batch(config, images),
        }
        """Samples of all ranks in a micro-batch of each player."""
        # Latents of discriminator updates are contiguous: their addresses count images, not positions. Those of
        # generator updates are equally far apart at every growth level.
        apart = {
            "discriminator": accumulation * self.micro_batches["discriminator"],
            "generator": schedule.largest_generator_batch(config),
        }
        self._draws = {
            role: LatentPrefetcher(
                self._training_latents, f"{role} latents", batch // world_size, batch, accumulation, apart[role]
            )
            for role, batch in self.micro_batches.items()
        }
        read = self.micro_batches.values() if config.generator_draws_reals else [self.micro_batches["discriminator"]]
        # Both indexes list the same samples, so that streams of one seed are at the same sample.
        self._streams: list[Stream] = [
            open_rank_stream(
                data,
                self.state.seed,
                index,
                start=start,
                micro_batch=max(read),
                sizes=partial(schedule.stream_micro_batches, config, self.progress.step, images),
                rank=self.runtime.rank,
                world_size=self.runtime.world_size,
                substitutions=self.progress.substitutions,
                pin_memory=self.runtime.device.type == "cuda",
            )
            for data, index in self._sources
        ]

    def discriminator_inputs(self, update: schedule.Update) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a discriminator update: reals from the stream, latents and labels for fakes."""
        if update.micro_batch != self.micro_batches["discriminator"]:
            self.close()
            self._open(update.start, update.images)
        self._last_batches.clear()
        self._last_latents.clear()
        keeps = self.config.objective.generator_needs_reals and not self.config.generator_draws_reals
        keeps_latents = self.config.training.generator_latents == "last"
        for first in range(update.images, update.images + update.batch_size, update.micro_batch):
            (batch, *images), drawn = self._next_batches(), self._draw("discriminator", first)
            if keeps:
                self._last_batches.append(batch)
            if keeps_latents:
                self._last_latents.append(drawn)
            yield self._micro_batch(drawn, batch)._replace(images=self._real_images(batch, *images))

    def generator_inputs(self, step: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a generator update.

        If the objective needs reals, they are the next of the stream, or those of the step's last discriminator update
        (`training.generator_reals`). The latter stay in host memory and are copied to the device again, so that the
        device never holds a whole batch. Latents are its own or those of that update too
        (`training.generator_latents`).
        """
        first = schedule.generator_slot(self.config, step)
        for number in range(self.config.training.accumulation):
            batch = self._last_batches[number] if self._last_batches else None
            if self.config.generator_draws_reals:
                batch = self._next_batches()[0]
            if self._last_latents:
                drawn = self._last_latents[number]
            else:
                drawn = self._draw("generator", first + number * self.micro_batches["generator"])
            yield self._micro_batch(drawn, batch)

    def share_failures(self) -> None:
        """Share the unreadable samples of all ranks; replacements apply from the next position.

        Collective: call on every rank.

        Raises:
            UserError: the fraction of unreadable samples exceeds `data.max_failure_rate`.
        """
        everyones = self.runtime.gather_objects(self.failures)
        self.failures = []
        progress, limit, main = self.progress, self.config.data.max_failure_rate, self.runtime.is_main
        count = len(self.state.index)
        record_failures(progress.substitutions, everyones, progress.position, count, limit, main=main)

    def close(self) -> None:
        """Stop the data loader workers."""
        for stream in self._streams:
            stream.close()

    def _draw(self, role: str, start: int) -> Drawn:
        """Return this rank's part of the latents and labels of the micro-batch at latent address `start`."""
        share = self.micro_batches[role] // self.runtime.world_size
        return self._draws[role].take(start + self.runtime.rank * share)

    def _micro_batch(self, drawn: Drawn, batch: Batch | None) -> MicroBatch:
        """Return latents and labels with the reals of `batch`."""
        return MicroBatch(*drawn, *(self._to_device(batch) if batch is not None else (None, None)))

    def _next_batches(self) -> list[Batch]:
        """Return the next reals, and their images if they are read."""
        started = time.perf_counter()
        batches = [next(stream) for stream in self._streams]
        self.seconds_waited += time.perf_counter() - started
        self.failures += [failure for each in batches for failure in each.failures]
        batch = batches[0]
        if any(batch.others):
            raise UserError(
                f"data.stages: makes {1 + max(map(len, batch.others))} values of a sample, but networks get only the "
                "first; end with the one to train on; distgan.data.Loader passes all on"
            )
        return batches

    def _real_images(self, batch: Batch, images: Batch | None = None) -> RealImages | None:
        if images is None:
            return None
        device, known = self.runtime.device, images.indices == batch.indices
        return RealImages(images.data.to(device, non_blocking=True), known.to(device, non_blocking=True))

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return reals as network inputs at the current growth level, and their labels (None if unconditional)."""
        device = self.runtime.device
        values = batch.data.to(device, non_blocking=True)
        reals = to_network(self.state.shape, values, self.state.seed, batch.positions)
        if self.state.growth is not None:
            reals = shrink(reals, self.state.growth.resolution)
            if self.state.growth.fading:
                reals = fade_reals(reals, self.state.growth.fade)
        labels = batch.labels.to(device, non_blocking=True) if self.config.data.labels else None
        return reals.contiguous(memory_format=self._memory_format), labels
