"""Names of metric values and the direction of improvement, without the slow imports of the metrics."""

from __future__ import annotations

from typing import NamedTuple

from distgan.config import Config, MetricConfig


class Criterion(NamedTuple):
    """Metric value that ranks checkpoints."""

    name: str
    higher_is_better: bool

    def better(self, value: float, than: float) -> bool:
        """Return True if a value is strictly better; NaN never is."""
        return value > than if self.higher_is_better else value < than


def criterion(config: Config) -> Criterion:
    """Return the value that decides the best checkpoint: that of the run's first metric. Without any it has no name."""
    if not config.metrics:
        return Criterion("", higher_is_better=False)
    first = config.metrics[0]
    return Criterion(value_name(first), bool(first.facts.higher_is_better))


def value_name(metric: MetricConfig, suffix: str | None = None) -> str:
    """Return the name of a value of a metric in `Config.metrics`: `fid[classifier]`, `modes` or `ngram_js[4]`.

    Args:
        suffix: selects a value of the metric; None is the main one.
    """
    return metric.label + (metric.facts.main_value if suffix is None else suffix) + metric.brackets
