"""Divergence of a run for good: the metric that ranks checkpoints has been far worse than its best value for a while.

Losses do not decide it: both players' losses depend on the opponent, so no threshold on them separates a collapsed run
from a good one. BigGAN's runs collapse late, and its results are of checkpoints from before (Brock et al. 2019, section
4).

The state is a function of the evaluations so far and part of the checkpoint, so a resumed run acts at the same step as
an uninterrupted one. All ranks have the same metrics, so they decide alike without communication.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from distgan.config import DivergenceConfig

LOST = 0.05
"""Least share of the gain since the first evaluation that a diverged run has lost. It keeps the noise of a metric whose
best value is near 0, such as KID, from counting as divergence."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, lt=2**62)]


class Divergence(BaseModel):
    """State of the guard after the evaluations so far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = ""
    """Name of the metric value that ranks checkpoints."""
    first: Finite | None = None
    """First finite value; None if there was none."""
    last: Finite | None = None
    """Value of the last evaluation; None if it was not finite."""
    step: Whole | None = None
    """Step of the last evaluation."""
    worse: Whole = 0
    """Number of last evaluations in a row that were far worse than the best."""


def observe(
    past: Divergence, step: int, metric: str, value: float, best: float | None, *, higher: bool, factor: float
) -> Divergence:
    """Return the state after one more evaluation.

    Args:
        value: may be infinite or NaN, which counts as far worse.
        best: best value so far, with this one; None if no value was finite.
        higher: True if the metric improves as it grows.
        factor: above 1; see `is_far_worse`.
    """
    if past.metric != metric:
        past = Divergence(metric=metric)
    elif past.step == step:  # evaluated again, because its row was lost
        return past
    last = value if math.isfinite(value) else None
    first = last if past.first is None else past.first
    worse = past.worse + 1 if last is None or is_far_worse(last, best, first, higher=higher, factor=factor) else 0
    return Divergence(metric=metric, first=first, last=last, step=step, worse=worse)


def is_far_worse(value: float, best: float | None, first: float | None, *, higher: bool, factor: float) -> bool:
    """Return True if a value is worse than the best one by the factor, and has lost the share `LOST` of the gain."""
    if best is None:
        return False
    loss = best - value if higher else value - best
    least = abs(best) * (1 - 1 / factor if higher else factor - 1)
    gain = abs(best - first) if first is not None else 0.0
    return loss > 0 and loss >= max(least, LOST * gain)


def why_diverged(found: Divergence, guard: DivergenceConfig, best: float | None) -> str | None:
    """Return how a run has diverged for good, or None if it has not."""
    if found.worse < guard.patience:
        return None
    last = "not finite" if found.last is None else f"{found.last:.4g}"
    beside = "no finite value before" if best is None else f"best {best:.4g}"
    return (
        f"{found.metric} diverged: {last} at step {found.step}, {beside}; worse by a factor of {guard.factor:g} in "
        f"{found.worse} evaluations in a row"
    )
