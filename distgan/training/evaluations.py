"""Evaluation of the EMA generator during training: when it is due, and whether its result is the best so far."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

from distgan.autoencoders.decoding import image_evaluation
from distgan.config import DivergenceConfig
from distgan.distributed.runtime import Runtime
from distgan.errors import Interrupted, UserError
from distgan.evaluation.names import criterion
from distgan.inference import generation
from distgan.inference.latents import Source
from distgan.monitoring import divergence
from distgan.runs.stop_request import StopRequest
from distgan.training.state import TrainingState

if TYPE_CHECKING:
    from distgan.evaluation.suite import Evaluator

logger = logging.getLogger("distgan")


class Evaluation(NamedTuple):
    """Result of one evaluation."""

    metrics: dict[str, float]
    is_best: bool = False
    """True if the first metric is better than in all earlier evaluations."""
    interrupted: bool = False
    """True if a stop request ended the evaluation; the next start repeats it. Equal on all ranks."""


class Evaluations:
    """Evaluates the EMA generator every `evaluation.every` steps. Collective: call on every rank."""

    def __init__(self, state: TrainingState, latents: Source, runtime: Runtime, stop: StopRequest) -> None:
        self.state, self.latents, self.runtime, self.stop = state, latents, runtime, stop
        self.criterion = criterion(state.config)
        """First metric, with the direction in which it improves."""
        self._evaluator: Evaluator | None = None

    def is_due(self) -> bool:
        """Return True if an evaluation is due at the current step."""
        every = self.state.config.evaluation.every
        return every > 0 and self.state.progress.step % every == 0

    def measure(self) -> Evaluation:
        """Evaluate the EMA generator. Recompute its batch-norm statistics first. Collective: call on every rank."""
        config, step = self.state.config, self.state.progress.step
        if self.runtime.is_main:
            logger.info("step %d: evaluating %d generated samples", step, config.generated_samples)
        from distgan.evaluation.suite import Evaluator  # imported late: it takes seconds, and many runs never evaluate

        try:
            if self._evaluator is None:
                with self.runtime.raise_on_all_ranks():
                    measured = image_evaluation(config, self.state.index, self.state.decoder)
                self._evaluator = Evaluator(*measured, self.runtime, lambda: self.stop.requested)
            with (
                self.runtime.full_params(self.state.average.network),
                generation.generating(*self.state.sampler, self.latents, "evaluation") as generate,
            ):
                metrics = self._evaluator(generate)
        except Interrupted:
            if self.runtime.is_main:
                logger.warning("step %d: stop requested during the evaluation; the next start repeats it", step)
            return Evaluation({}, interrupted=True)
        if self.runtime.is_main:
            logger.info("step %d: %s", step, ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        is_best = self._note_best(metrics)
        self._note_divergence(metrics[self.criterion.name])
        return Evaluation(metrics, is_best)

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Return True, and record the value, if the first metric is better than in all earlier evaluations."""
        name, progress, best = self.criterion.name, self.state.progress, self.state.progress.best
        if name not in metrics:
            raise UserError(
                f"evaluation.metrics: the first metric has no value {name}, which would choose the best checkpoint; "
                f"found {', '.join(metrics)}; set its attribute main_value, such as '_share', or put another one first",
                everywhere=True,
            )
        if not math.isfinite(metrics[name]):
            return False
        if best is not None and best["metric"] == name and not self.criterion.better(metrics[name], best["value"]):
            return False
        progress.best = {"metric": name, "value": metrics[name], "step": progress.step}
        return True

    def _note_divergence(self, value: float) -> None:
        """Count the evaluation if it is far worse than the best one; `training.on_divergence` may act on it later."""
        (name, higher), progress, config = self.criterion, self.state.progress, self.state.config
        best = progress.best["value"] if progress.best is not None and progress.best["metric"] == name else None
        # Counted without a guard too, so that a run can be started again with one.
        guard = config.training.on_divergence or DivergenceConfig(action="stop")
        progress.divergence = divergence.observe(
            progress.divergence, progress.step, name, value, best, higher=higher, factor=guard.factor
        )
