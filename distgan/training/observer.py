"""What is seen of a run while it trains: scalars, sample grids and metrics of the average."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan import generation
from distgan.config import dump_config, flatten
from distgan.distributed.runtime import Runtime
from distgan.latents import LatentSource
from distgan.monitoring import pictures
from distgan.monitoring.console import Console
from distgan.monitoring.tracker import open_tracker
from distgan.networks.layers.normalisation import recompute_statistics
from distgan.training import schedule
from distgan.training.feed import Feed
from distgan.training.pace import Pace
from distgan.training.preemption import StopRequest
from distgan.training.state import TrainingState

if TYPE_CHECKING:
    from distgan.evaluation.suite import Evaluator

logger = logging.getLogger("distgan")


class _Interrupted(Exception):
    """The run was asked to stop in the middle of an evaluation."""


class Observer:
    """Measures, evaluates and pictures the run. Every rank calls it alike; rank 0 writes."""

    def __init__(self, state: TrainingState, feed: Feed, runtime: Runtime, stop: StopRequest) -> None:
        self.state, self.feed, self.runtime, self.stop = state, feed, runtime, stop
        self._evaluator: Evaluator | None = None
        self.config = state.config
        self.latents: LatentSource = feed.latents
        self.run_dir = Path(state.config.run_dir)
        self._fid = f"fid[{self.config.evaluation.detector}]"
        step = state.progress.step
        self.tracker = open_tracker(
            self.run_dir,
            tensorboard=self.config.monitoring.tensorboard,
            resume_step=step if step else None,
            main=runtime.is_main,
        )
        self.console = Console(total=self.config.training.steps, start=step, main=runtime.is_main)
        self.tracker.text("config", dump_config(self.config))
        self.tracker.hyperparameters(flatten(self.config), [self._fid])
        self.pace = Pace(runtime, [player.network for player in state.players])
        self.checkpoint_failures = 0
        self._start_interval()

    def after_step(self, *, evaluate: bool = True) -> bool:
        """Write down what is due after a step. Returns whether this is the best average so far."""
        progress, config = self.state.progress, self.config
        self.pace.end()
        self.runtime.step = progress.step
        self.console.advance(progress.step)
        row: dict[str, float] = {}
        if progress.step > 0 and progress.step % config.monitoring.every == 0:
            row = self._measure()
        evaluated = evaluate and config.evaluation.every > 0 and progress.step % config.evaluation.every == 0
        pictured = progress.step % config.monitoring.samples_every == 0
        if evaluated or pictured:
            self._fit_statistics()
        is_best = False
        if evaluated:
            metrics = self._evaluate()
            is_best = bool(metrics) and self._note_best(metrics)
            row = {**row, **metrics}
        if pictured and self.runtime.is_main:
            self._draw_samples()
        if row:
            self.tracker.scalars(progress.step, progress.position, row)
            self.console.update(progress.step, row)
        if row or pictured:
            self._start_interval()
        if (progress.step + 1) % config.monitoring.every == 0:
            self.pace.begin()
        return is_best

    def close(self) -> None:
        """Finish the files."""
        self.pace.end()
        self.console.close()
        self.tracker.close()

    def _start_interval(self) -> None:
        """Rates are measured from here, so that evaluations and sample grids do not count as training time."""
        self._started = time.perf_counter()
        self._first_position = self.state.progress.position
        self._first_step = self.state.progress.step
        self.feed.seconds_waited = 0.0

    def _measure(self) -> dict[str, float]:
        """What the players reported since the last time, with rates and sizes. It waits for the device."""
        state, progress, config = self.state, self.state.progress, self.config
        row: dict[str, float] = {}
        for player in state.players:
            row |= player.statistics.reduce(self.runtime)
            row[f"learning_rate/{player.role}"] = player.optimizer.param_groups[0]["lr"]
            row[f"skipped_updates/{player.role}"] = player.skipped.item()
        seconds = time.perf_counter() - self._started
        steps = max(1, progress.step - self._first_step)
        images_per_step = config.training.critic_steps * config.training.batch_size
        row["ema/decay"] = schedule.ema_decay(config.ema, progress.position - images_per_step, images_per_step)
        row["speed/images_per_second"] = (progress.position - self._first_position) / seconds
        row["speed/step_seconds"] = seconds / steps
        row["speed/data_wait_seconds"] = self.feed.seconds_waited / steps
        row |= self.pace.measure()
        row["memory/host_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if self.runtime.device.type == "cuda":
            row["memory/device_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        row["data/replaced_samples"] = len(progress.substitutions)
        row["checkpoint/failures"] = self.checkpoint_failures
        row["progress/kimg"] = progress.position / 1000
        return row

    def _fit_statistics(self) -> None:
        """Fit the average's batch-norm statistics to its weights."""
        batches = generation.statistics_batches(
            self.latents, self.config, rank=self.runtime.rank, world_size=self.runtime.world_size
        )
        recompute_statistics(self.state.average.network, batches)

    def _evaluate(self) -> dict[str, float]:
        """All metrics of the average; none if the run was asked to stop meanwhile, as that cannot wait."""
        from distgan.evaluation.suite import Evaluator  # late, because it takes seconds that many runs never need

        if self._evaluator is None:
            self._evaluator = Evaluator(self.config, self.state.index, self.runtime)
        runtime, settings = self.runtime, self.config.evaluation
        # Ranks may differ by one batch in how many they generate; only what all of them do can be agreed upon.
        common = -(-(settings.num_samples // runtime.world_size) // settings.batch_size)
        asked = runtime.exchange([False])

        def generate(samples: Tensor) -> Tensor:
            nonlocal asked, common
            if common > 0:
                common -= 1
                if asked.result()[0]:
                    raise _Interrupted
                asked = runtime.exchange([self.stop.requested])
            return generation.generate(self.state.average.network, self.latents, "evaluation", samples)

        try:
            return self._evaluator(generate)
        except _Interrupted:
            logger.warning(
                "step %d: evaluation left undone, because the run was asked to stop", self.state.progress.step
            )
            return {}
        finally:
            asked.result()

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Whether this is the lowest FID so far; if so, it is remembered."""
        name, step, best = self._fid, self.state.progress.step, self.state.progress.best
        if self.runtime.is_main:
            logger.info("step %d: %s", step, ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        if best is not None and best["metric"] == name and best["value"] <= metrics[name]:
            return False
        self.state.progress.best = {"metric": name, "value": metrics[name], "step": step}
        return True

    def _draw_samples(self) -> None:
        """A grid of the same latents every time, on disk and in TensorBoard."""
        step = self.state.progress.step
        numbers = torch.arange(self.config.monitoring.num_samples)
        images = generation.generate(self.state.average.network, self.latents, "sample grid", numbers)
        grid = pictures.grid(images.cpu())
        self.tracker.image(step, "samples", grid)
        try:
            pictures.save_png(self.run_dir / "samples" / f"step-{step:08d}.png", grid)
        except OSError as error:
            logger.error("step %d: cannot write the sample grid: %s; training goes on", step, error)
