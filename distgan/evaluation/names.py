"""What the values of metrics are called and which way is better, without the seconds that importing them takes."""

from __future__ import annotations

from typing import NamedTuple

from distgan.config import Config

WITH_DETECTOR = frozenset({"fid", "inception_score", "kid", "classes"})
"""Metrics of what a detector sees; their values are named by it too."""
_CHIEF = {"ngram_js": "[4]"}
"""Suffix of the chief value, where it has one."""
HIGHER_IS_BETTER = frozenset({"inception_score", "classes", "modes"})


class Criterion(NamedTuple):
    """A value by which checkpoints are compared."""

    name: str
    higher_is_better: bool

    def better(self, value: float, than: float) -> bool:
        """Whether a value is strictly better; NaN is not."""
        return value > than if self.higher_is_better else value < than


def criterion(config: Config) -> Criterion:
    """The first of a run's metrics decides which checkpoint is best."""
    return Criterion(value_name(config.metrics[0], config), config.metrics[0] in HIGHER_IS_BETTER)


def value_name(metric: str, config: Config, suffix: str | None = None) -> str:
    """What a value of a metric is called, such as `fid[classifier]`, `modes` or `ngram_js[4]`.

    Args:
        suffix: which of its values; None is its chief one.
    """
    suffix = _CHIEF.get(metric, "") if suffix is None else suffix
    return f"{metric}{suffix}[{config.evaluation.detector}]" if metric in WITH_DETECTOR else metric + suffix
