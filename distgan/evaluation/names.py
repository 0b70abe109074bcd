"""Names of metric values and the direction of improvement, without the slow imports of the metrics."""

from __future__ import annotations

from typing import NamedTuple

from distgan.config import Config

WITH_DETECTOR = frozenset({"fid", "inception_score", "kid", "classes"})
"""Metrics of detector outputs; the names of their values include the detector."""
_CHIEF = {"ngram_js": "[4]"}
"""Suffix of the main value, by metric, where it has one."""
HIGHER_IS_BETTER = frozenset({"inception_score", "classes", "modes"})


class Criterion(NamedTuple):
    """Metric value that ranks checkpoints."""

    name: str
    higher_is_better: bool

    def better(self, value: float, than: float) -> bool:
        """Return True if a value is strictly better; NaN never is."""
        return value > than if self.higher_is_better else value < than


def criterion(config: Config) -> Criterion:
    """Return the value that decides the best checkpoint: that of the run's first metric."""
    return Criterion(value_name(config.metrics[0], config), config.metrics[0] in HIGHER_IS_BETTER)


def value_name(metric: str, config: Config, suffix: str | None = None) -> str:
    """Return the name of a metric's value, such as `fid[classifier]`, `modes` or `ngram_js[4]`.

    Args:
        suffix: selects a value of the metric; None is the main one.
    """
    suffix = _CHIEF.get(metric, "") if suffix is None else suffix
    return f"{metric}{suffix}[{config.evaluation.detector}]" if metric in WITH_DETECTOR else metric + suffix
