"""Monitoring of a run: rows of scalars and metrics, and sample grids."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from distgan import schedule
from distgan.checkpoint.writer import CheckpointWriter
from distgan.config import dump_config, flatten
from distgan.data.kinds.text import decode_lines
from distgan.distributed.runtime import Runtime
from distgan.evaluation.names import value_name
from distgan.evaluation.precision import ieee_float32
from distgan.files import reason, write_lines
from distgan.inference import generation
from distgan.inference.latents import Source
from distgan.monitoring import diagnosis, pictures
from distgan.monitoring.console import Console
from distgan.monitoring.stragglers import StragglerMonitor
from distgan.monitoring.tracker import open_tracker
from distgan.networks.layers.normalization import recompute_statistics
from distgan.training.evaluations import Evaluations
from distgan.training.inputs import Feed
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")

INTERPOLATION = 4, 8
"""Number of latent interpolation paths per sample grid, and number of images per path."""


class StepReport(NamedTuple):
    """Result of the monitoring of one step, for the training loop. Equal on all ranks."""

    is_best: bool = False
    """True if the EMA generator was evaluated and is the best so far."""
    evaluation_left: bool = False
    """True if a stop request left a due evaluation to the next start."""
    metrics: Mapping[str, float] = {}
    """Values of the evaluation, if there was one."""


class Monitor:
    """Measures the run and draws its samples; rank 0 writes the files. Collective: call on every rank.

    Raises:
        UserError: rank 0 cannot read the images of an autoencoder's sample grids; build it under
            `raise_on_all_ranks`.
    """

    def __init__(
        self,
        state: TrainingState,
        feed: Feed,
        evaluations: Evaluations,
        writer: CheckpointWriter,
        runtime: Runtime,
    ) -> None:
        self.state, self.feed, self.evaluations, self.writer, self.runtime = state, feed, evaluations, writer, runtime
        self.config = state.config
        self.latents: Source = feed.latents
        self.run_dir = state.config.run_folder
        self._inputs: torch.Tensor | None = None
        """Images of an autoencoder's sample grids, (n, C, R, R), on rank 0."""
        if self.config.objective.reconstruction is not None and runtime.is_main:
            # Read here, where all ranks learn of an error: later it would be that of one rank, and the others wait.
            places = torch.arange(self.config.monitoring.num_samples)
            self._inputs = self.latents.draw("sample grid", places)[0].cpu()
        self._schedules = dict(schedule.scheduled(state.config))
        step, settings = state.progress.step, flatten(self.config)
        self.tracker = open_tracker(
            self.run_dir,
            tensorboard=self.config.monitoring.tensorboard,
            resume_step=step if step else None,
            main=runtime.is_main,
            trackers=self.config.monitoring.trackers,
            settings=settings,
        )
        self.console = Console(total=schedule.run_steps(self.config), start=step, main=runtime.is_main)
        self.tracker.text("config", dump_config(self.config))
        values = [value_name(metric) for metric in self.config.metrics]
        self.tracker.hyperparameters(settings, values)
        self.stragglers = StragglerMonitor(runtime, [player.network for player in state.players])
        self._start_interval()

    def before_first_step(self) -> StepReport:
        """Record what is due before this process's first step. Collective: call on every rank.

        At step 0 this is everything. At a later step it is an evaluation that a stop request interrupted.
        """
        step = self.state.progress.step
        if step == 0:
            return self.after_step()
        recorded = self.runtime.broadcast_object(self.tracker.recorded(step))
        if not self.evaluations.is_due() or self.evaluations.criterion.name in recorded:
            return StepReport()
        self._fit_statistics()
        evaluation = self.evaluations.measure()
        self._write(evaluation.metrics)
        self._start_interval()
        return StepReport(evaluation.is_best, evaluation.interrupted, evaluation.metrics)

    def after_step(self, *, evaluate: bool = True) -> StepReport:
        """Record what is due after a step. Collective: call on every rank.

        Args:
            evaluate: if False, leave a due evaluation to the next start.
        """
        progress, config = self.state.progress, self.config
        self.stragglers.end()
        self.runtime.step = progress.step
        self.console.advance(progress.step)
        row: dict[str, float] = {}
        if self._is_logged(progress.step):
            row = self._measure()
            self._diagnose(row)
        elif self.state.is_complete:
            # If you make the run longer and resume, it must equal one that was as long from the start.
            # Therefore the interval stays open and nothing is diagnosed.
            row = self._measure(ends_interval=False)
        due = self.evaluations.is_due()
        pictured = progress.step % config.monitoring.samples_every == 0
        fitted = (due and evaluate) or pictured
        if fitted:
            self._fit_statistics()
        report = StepReport(evaluation_left=due)
        if due and evaluate:
            evaluation = self.evaluations.measure()
            row |= evaluation.metrics
            report = StepReport(evaluation.is_best, evaluation.interrupted, evaluation.metrics)
        last = self.state.is_complete or self._stops_early()
        if pictured or last:
            fit = nullcontext() if fitted else self._fitted_for_now()
            with fit, self.runtime.full_params(self.state.average.network):
                if self.runtime.is_main:
                    self._draw_samples()
        self._write(row)
        if row or pictured or last:
            self._start_interval()
        if self._is_logged(progress.step + 1) or self.state.is_before_last_step:
            self.stragglers.begin()
        return report

    def note(self, text: str) -> None:
        """Write a line on a divergence to TensorBoard."""
        self.tracker.text("divergence", text, self.state.progress.step)

    def close(self) -> None:
        """Flush and close all files."""
        self.stragglers.end()
        self.console.close()
        self.tracker.close()

    def _start_interval(self) -> None:
        """Restart the timers, so that evaluations and sample grids do not count as training time."""
        self._started = time.perf_counter()
        self._first_images = self.state.progress.images
        self._first_step = self.state.progress.step
        self.feed.seconds_waited = 0.0

    def _is_logged(self, step: int) -> bool:
        return step > 0 and step % self.config.monitoring.every == 0

    def _measure(self, *, ends_interval: bool = True) -> dict[str, float]:
        """Return the players' mean scalars of the interval, with speeds and memory sizes. It waits for the device."""
        state, progress = self.state, self.state.progress
        row: dict[str, float] = {}
        for player in state.players:
            row |= (player.statistics.reduce if ends_interval else player.statistics.means)(self.runtime)
            row[f"learning_rate/{player.role}"] = player.engine.optimizer.param_groups[0]["lr"]
            row[f"skipped_updates/{player.role}"] = player.skipped.item()
        seconds = time.perf_counter() - self._started
        steps = max(1, progress.step - self._first_step)
        row["ema/decay"] = state.average.decay
        for key, setting in self._schedules.items():
            row["schedule/" + key] = schedule.value(setting, progress.images, state.length)
        row["speed/images_per_second"] = (progress.images - self._first_images) / seconds
        row["speed/step_seconds"] = seconds / steps
        row["speed/data_wait_seconds"] = self.feed.seconds_waited / steps
        row |= self.stragglers.measure()
        row["memory/host_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if self.runtime.device.type == "cuda":
            row["memory/device_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        row["data/replaced_samples"] = len(progress.substitutions)
        row["checkpoint/failures"] = self.writer.failures
        row["tracker/failures"] = self.tracker.failures
        row["progress/kimg"] = progress.images / 1000
        if self.config.training.on_divergence is not None:
            row["progress/rollbacks"] = len(progress.rollbacks)
        if state.growth is not None:
            row["growth/level"] = state.growth.level
            row["growth/fade"] = state.growth.fade
            row["growth/resolution"] = state.growth.resolution
        return row

    def _diagnose(self, row: dict[str, float]) -> None:
        """Log a warning for each problem that the scalars show."""
        progress, stop = self.state.progress, self.config.training.early_stopping
        progress.diagnosis, warnings = diagnosis.observe(progress.diagnosis, progress.step, row, stop)
        for warning in warnings if self.runtime.is_main else ():
            logger.warning("%s", warning)

    def _stops_early(self) -> bool:
        return diagnosis.why_stop(self.state.progress.diagnosis, self.config.training.early_stopping) is not None

    @contextmanager
    def _fitted_for_now(self) -> Iterator[None]:
        """Context manager with recomputed batch-norm statistics, and afterward with those from before.

        If you make the run longer and resume, it must equal one that was as long from the start.
        """
        buffers = list(self.state.average.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        self._fit_statistics()
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def _fit_statistics(self) -> None:
        """Recompute the batch-norm statistics of the EMA generator."""
        batches = generation.statistics_batches(
            self.latents, self.config, rank=self.runtime.rank, world_size=self.runtime.world_size
        )
        network = self.state.average.network
        with ieee_float32(), self.runtime.full_params(network):
            recompute_statistics(network, batches, across_ranks=True)

    def _write(self, row: dict[str, float]) -> None:
        if row:
            self.tracker.scalars(self.state.progress.step, self.state.progress.images, row)
            self.console.update(self.state.progress.step, row)

    def _draw_samples(self) -> None:
        """Write samples of fixed latents to disk and TensorBoard: an image grid, text lines, or a scatter plot.

        Of an autoencoder it is a grid of real images, each followed by its reconstruction.
        """
        step, vocabulary, (network, shape) = self.state.progress.step, self.state.index.vocabulary, self.state.sampler
        reconstructs = self._inputs is not None
        with generation.generating(network, shape, self.latents, "sample grid") as generate:
            if self._inputs is not None:
                samples = generate.beside_reconstructions(self._inputs.to(self.runtime.device)).cpu()
            else:
                samples = generate(torch.arange(self.config.monitoring.num_samples)).cpu()
        file = self.run_dir / "samples" / f"step-{step:08d}"
        try:
            if vocabulary is not None:
                lines = decode_lines(samples.numpy(), vocabulary)
                self.tracker.text("samples", "\n".join(lines), step)
                write_lines(file.with_suffix(".txt"), lines)
            else:
                picture = generation.picture_of(shape, samples, pairs=reconstructs)
                self.tracker.image(step, "samples", picture)
                pictures.save_png(file.with_suffix(".png"), picture)
        except OSError as error:
            logger.error("step %d: %s: cannot write the samples: %s; training goes on", step, file, reason(error))
        if shape.kind == "images" and not reconstructs:
            paths = generation.generate_paths(network, shape, self.latents, "interpolation", *INTERPOLATION)
            self.tracker.image(step, "interpolation", pictures.grid(paths, columns=INTERPOLATION[1]))
