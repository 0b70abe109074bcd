"""What a run's own curves say of it: that it is stuck, that it has collapsed, or that there is no more to be had.

A diagnosis is made of each row of the curves, and is a function of the rows so far. What it keeps of them is part of
the checkpoint, so that a resumed run warns and stops where one that was never interrupted would; all ranks have the
same rows, and come to the same diagnosis without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from distgan.config import EarlyStoppingConfig

HALF_LIFE = 1000
"""Steps in which the weight of a row in what a curve was in the past halves."""
CERTAIN = 0.99
"""A discriminator is certain when it gives its own side at least this probability, of both kinds of samples."""
VANISHED = 0.05
"""A gradient has vanished when its norm is less than this share of what it was."""
ALIKE = 0.3
"""Samples are alike when they differ by less than this share of how much they did, or of how much real ones do."""
VARIED = 0.6
"""They have been varied when they once differed by this share of how much real ones do."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Step = Annotated[int, Field(ge=0, lt=2**62)]
Row = Mapping[str, float]
Episode = Literal["saturation", "collapse"]

_GRADIENT, _DIVERSITY, _ESTIMATE = "gradient_norm/generator", "generator/diversity", "divergence/wasserstein"


class Diagnosis(BaseModel):
    """What is kept of the rows so far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Step = 0
    """That of the last row."""
    gradient: Finite | None = None
    """What the norm of the generator's gradient was, on average, while it was not saturated."""
    diversity: Finite | None = None
    """How much generated samples differed, on average, while they were not alike."""
    varied: bool = False
    """Whether generated samples have been about as varied as real ones."""
    under_way: tuple[Episode, ...] = ()
    """Episodes that were warned of and are not over."""
    estimate: Finite | None = None
    """The smoothed estimate of the Wasserstein distance, where a run can stop on it."""
    level: Finite | None = None
    """The value near which that has stayed ..."""
    since: Step = 0
    """... since this step."""


def observe(past: Diagnosis, step: int, row: Row, stop: EarlyStoppingConfig | None) -> tuple[Diagnosis, list[str]]:
    """The diagnosis after one more row, and a warning for each episode that begins with it.

    Args:
        step: that of the row, greater than that of the row before.
        row: the curves by name; those that are missing or not finite tell nothing.
    """
    row = {name: value for name, value in row.items() if math.isfinite(value)}
    found: dict[str, object] = {"step": step}
    warnings = []
    under_way = list(past.under_way)
    for name, watch in _WATCHES.items():
        kept, warning = watch(past, step, row)
        found |= kept
        if warning is None and name in under_way:
            under_way.remove(name)
        elif warning is not None and name not in under_way:
            under_way.append(name)
            warnings.append(f"step {step}: {warning}")
    found["under_way"] = tuple(under_way)
    if stop is not None and _ESTIMATE in row:
        found |= _watch_estimate(past, step, row[_ESTIMATE], stop)
    return past.model_copy(update=found), warnings


def why_stop(diagnosis: Diagnosis, stop: EarlyStoppingConfig | None) -> str | None:
    """Why there is nothing more to be had from training; None if there may be."""
    if stop is None or diagnosis.level is None or diagnosis.step - diagnosis.since < stop.steps:
        return None
    return (
        f"the Wasserstein estimate has been within {stop.tolerance:.1%} of {diagnosis.level:.4g} since step "
        f"{diagnosis.since} (training.early_stopping)"
    )


def _watch_saturation(past: Diagnosis, step: int, row: Row) -> tuple[dict[str, object], str | None]:
    """Goodfellow et al. 2014, section 3: where D is certain, log(1 - D(G(z))) has no gradient for G."""
    if _GRADIENT not in row:
        return {}, None
    gradient, before = row[_GRADIENT], past.gradient
    # Only the cross-entropy families have probabilities; other discriminators are never certain.
    real, fake = row.get("discriminator/real_probability", 0.5), row.get("discriminator/fake_probability", 0.5)
    if before is None or gradient >= VANISHED * before or real < CERTAIN or fake > 1 - CERTAIN:
        return {"gradient": _average(before, gradient, step - past.step, HALF_LIFE)}, None
    return {}, (
        f"saturation: the discriminator is certain ({real:.2g} of real, {fake:.2g} of generated samples) and the "
        f"generator's gradient is down to {gradient / before:.1%} of what it was; try "
        "objective.adversarial=non_saturating if that is minimax, objective.instance_noise={}, "
        "objective.r1={gamma: 1} (without batch norm there), or a lower discriminator.optimizer.learning_rate"
    )


def _watch_collapse(past: Diagnosis, step: int, row: Row) -> tuple[dict[str, object], str | None]:
    """Whether generated samples, which once were varied, have become alike."""
    if _DIVERSITY not in row:
        return {}, None
    diversity, real, before = row[_DIVERSITY], row.get("data/diversity", 0.0), past.diversity
    fallen = before is not None and diversity < ALIKE * before
    if not (fallen or (past.varied and diversity < ALIKE * real)):
        average = _average(before, diversity, step - past.step, HALF_LIFE)
        return {"diversity": average, "varied": past.varied or 0 < VARIED * real <= diversity}, None
    return {}, (
        f"collapse: generated samples of a batch differ by {diversity:.3g} on average, after {before:.3g} before and "
        f"{real:.3g} among real ones; go back to a checkpoint before with --resume, and try objective.r1={{gamma: 1}} "
        "or lower learning rates; or start over with discriminator.minibatch_discrimination={}"
    )


_WATCHES: dict[Episode, Callable[[Diagnosis, int, Row], tuple[dict[str, object], str | None]]] = {
    "saturation": _watch_saturation,
    "collapse": _watch_collapse,
}
"""For each kind of episode, what is kept of a row, and the warning while it is under way."""


def _watch_estimate(past: Diagnosis, step: int, value: float, stop: EarlyStoppingConfig) -> dict[str, object]:
    """It is flat as long as its average stays near the level; once it leaves, a new level begins."""
    estimate = _average(past.estimate, value, step - past.step, stop.steps / 10)
    stays = past.level is not None and abs(estimate - past.level) <= stop.tolerance * abs(past.level)
    return {"estimate": estimate} if stays else {"estimate": estimate, "level": estimate, "since": step}


def _average(before: float | None, value: float, steps: int, half_life: float) -> float:
    """An exponential average that forgets half of itself in so many steps."""
    return value if before is None else value + (before - value) * 0.5 ** (steps / half_life)
