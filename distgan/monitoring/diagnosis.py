"""Diagnosis of a run from its curves: saturation, collapse, or convergence (early stopping).

The diagnosis is updated with each row of the curves and is a function of the rows so far. Its state is part of the
checkpoint, so a resumed run warns and stops at the same steps as an uninterrupted one. All ranks have the same rows,
so they reach the same diagnosis without communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from distgan.config import EarlyStoppingConfig

HALF_LIFE = 1000
"""Steps after which the weight of a row in a curve's moving average halves."""
CERTAIN = 0.99
"""The discriminator is certain if it assigns real and generated samples at least this probability of their class."""
VANISHED = 0.05
"""A gradient has vanished if its norm is below this fraction of its earlier average."""
ALIKE = 0.3
"""Samples have collapsed if their diversity is below this fraction of its earlier average or of the real samples'."""
VARIED = 0.6
"""Samples were diverse if their diversity once reached this fraction of the real samples'."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Step = Annotated[int, Field(ge=0, lt=2**62)]
Row = Mapping[str, float]
Episode = Literal["saturation", "collapse"]

_GRADIENT, _DIVERSITY, _ESTIMATE = "gradient_norm/generator", "generator/diversity", "divergence/wasserstein"


class Diagnosis(BaseModel):
    """State of the diagnosis after the rows so far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Step = 0
    """Step of the last row."""
    gradient: Finite | None = None
    """Moving average of the generator's gradient norm while it was not saturated."""
    diversity: Finite | None = None
    """Moving average of the generated samples' diversity while they had not collapsed."""
    varied: bool = False
    """True once generated samples have been about as diverse as real ones."""
    under_way: tuple[Episode, ...] = ()
    """Episodes with a warning that have not ended."""
    estimate: Finite | None = None
    """Smoothed estimate of the Wasserstein distance, for runs with early stopping."""
    level: Finite | None = None
    """Value that the smoothed estimate has stayed near."""
    since: Step = 0
    """Step since which it has stayed near `level`."""


def observe(past: Diagnosis, step: int, row: Row, stop: EarlyStoppingConfig | None) -> tuple[Diagnosis, list[str]]:
    """Return the diagnosis after one more row, and a warning for each episode that begins with it.

    Args:
        step: step of the row, greater than that of the row before.
        row: values by curve name; missing and non-finite values are ignored.
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
    """Return the reason to stop training early, or None to continue."""
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
        f"saturation: the discriminator is certain (probability {real:.2g} for real, {fake:.2g} for generated samples) "
        f"and the generator's gradient norm is {gradient / before:.1%} of its earlier average; try "
        "objective.adversarial=non_saturating instead of minimax, objective.instance_noise={}, "
        "objective.r1={gamma: 1} (without batch norm in the discriminator), or a lower "
        "discriminator.optimizer.learning_rate"
    )


def _watch_collapse(past: Diagnosis, step: int, row: Row) -> tuple[dict[str, object], str | None]:
    """Detect generated samples that were diverse and have become alike."""
    if _DIVERSITY not in row:
        return {}, None
    diversity, real, before = row[_DIVERSITY], row.get("data/diversity", 0.0), past.diversity
    fallen = before is not None and diversity < ALIKE * before
    if not (fallen or (past.varied and diversity < ALIKE * real)):
        average = _average(before, diversity, step - past.step, HALF_LIFE)
        return {"diversity": average, "varied": past.varied or 0 < VARIED * real <= diversity}, None
    return {}, (
        f"collapse: generated samples of a batch differ by {diversity:.3g} on average, {before:.3g} earlier, "
        f"{real:.3g} for real samples; resume from an earlier checkpoint with --resume and objective.r1={{gamma: 1}} "
        "or lower learning rates, or start a new run with discriminator.minibatch_discrimination={}"
    )


_WATCHES: dict[Episode, Callable[[Diagnosis, int, Row], tuple[dict[str, object], str | None]]] = {
    "saturation": _watch_saturation,
    "collapse": _watch_collapse,
}
"""Per kind of episode: its moving average, and the function that returns its warning while it lasts."""


def _watch_estimate(past: Diagnosis, step: int, value: float, stop: EarlyStoppingConfig) -> dict[str, object]:
    """Update the smoothed estimate; begin a new level when it leaves the tolerance around the old one."""
    estimate = _average(past.estimate, value, step - past.step, stop.steps / 10)
    stays = past.level is not None and abs(estimate - past.level) <= stop.tolerance * abs(past.level)
    return {"estimate": estimate} if stays else {"estimate": estimate, "level": estimate, "since": step}


def _average(before: float | None, value: float, steps: int, half_life: float) -> float:
    """Update an exponential moving average with this half-life in steps."""
    return value if before is None else value + (before - value) * 0.5 ** (steps / half_life)
