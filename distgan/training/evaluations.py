"""Metrics of the average while a run trains: when they are due, and whether they are the best so far."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

from distgan.distributed.runtime import Runtime
from distgan.errors import Interrupted
from distgan.evaluation.names import criterion
from distgan.inference import generation
from distgan.inference.latents import LatentSource
from distgan.runs.stop_request import StopRequest
from distgan.training.state import TrainingState

if TYPE_CHECKING:
    from distgan.evaluation.suite import Evaluator

logger = logging.getLogger("distgan")


class Evaluation(NamedTuple):
    """The outcome of one evaluation."""

    metrics: dict[str, float]
    is_best: bool = False
    """The first metric is better than ever before."""
    interrupted: bool = False
    """The run was asked to stop, so that the evaluation is left for the next start. All ranks agree."""


class Evaluations:
    """Every `evaluation.every` steps of a run. Every rank calls it alike."""

    def __init__(self, state: TrainingState, latents: LatentSource, runtime: Runtime, stop: StopRequest) -> None:
        self.state, self.latents, self.runtime, self.stop = state, latents, runtime, stop
        self.criterion = criterion(state.config)
        """What makes one average better than another."""
        self._evaluator: Evaluator | None = None

    def is_due(self) -> bool:
        """After the step that the state is at."""
        every = self.state.config.evaluation.every
        return every > 0 and self.state.progress.step % every == 0

    def measure(self) -> Evaluation:
        """Evaluate the EMA generator, whose statistics fit its weights. Collective: call on every rank."""
        from distgan.evaluation.suite import Evaluator  # late, because it takes seconds that many runs never need

        config, step = self.state.config, self.state.progress.step
        try:
            if self._evaluator is None:
                self._evaluator = Evaluator(config, self.state.index, self.runtime, lambda: self.stop.requested)
            if self.runtime.is_main:
                logger.info("step %d: evaluating %d generated samples", step, config.evaluation.num_samples)
            with generation.generating(
                self.state.average.network, self.state.shape, self.latents, "evaluation"
            ) as generate:
                metrics = self._evaluator(generate)
        except Interrupted:
            if self.runtime.is_main:
                logger.warning("step %d: evaluation left for after the resume, as the run was asked to stop", step)
            return Evaluation({}, interrupted=True)
        if self.runtime.is_main:
            logger.info("step %d: %s", step, ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        return Evaluation(metrics, is_best=self._note_best(metrics))

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Whether the first metric is better than ever before; if so, it is remembered."""
        name, progress, best = self.criterion.name, self.state.progress, self.state.progress.best
        if not math.isfinite(metrics[name]):
            return False
        if best is not None and best["metric"] == name and not self.criterion.better(metrics[name], best["value"]):
            return False
        progress.best = {"metric": name, "value": metrics[name], "step": progress.step}
        return True
