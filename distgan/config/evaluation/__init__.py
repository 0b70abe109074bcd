"""Metrics of a generator, and their detectors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from distgan.config.evaluation.detectors import DetectorConfig
from distgan.config.evaluation.metrics import (
    ALIASES,
    DEFAULT_METRIC,
    METRICS,
    MOST_SAMPLES,
    RESERVED,
    MetricConfig,
    MetricOptions,
)
from distgan.config.fields import Batch, Count, CountOrZero, Section

__all__ = [
    "ALIASES",
    "DEFAULT_METRIC",
    "METRICS",
    "DetectorConfig",
    "EvaluationConfig",
    "MetricConfig",
    "MetricOptions",
]


class EvaluationConfig(Section):
    """Metrics of the EMA generator."""

    every: CountOrZero = 0
    """Steps between evaluations; 0 evaluates only by `distgan evaluate`."""
    num_samples: Annotated[Count, Field(le=MOST_SAMPLES)] = 10_000
    """Number of generated samples of each metric without `samples` of its own. An evaluation generates as many as the
    metric that gets most; each metric gets the first of them."""
    batch_size: Batch = 64
    """Number of samples per forward pass on one rank."""
    metrics: Annotated[list[MetricConfig], Field(min_length=1)] | None = None
    """Metrics to compute; the first one decides which checkpoint is best. null: `fid` for images and decoded latents,
    `ngram_js` for text, `modes` for points. `metric` lists all. Your own are import paths, or sections with options
    and, for two of one class, a `name`."""
    detector: DetectorConfig = DetectorConfig()
    """Feature extractor of each metric without a `detector` of its own: its name, or a section with its options."""
    real_images: str | list[str] | None = None
    """Shards of images that decoded latents are compared with, such as those that were encoded. null: the images in the
    shards of latents, where `encode --images` puts them."""
    held_out: str | None = None
    """Folder of text shards that are not trained on, for `ngram_js`. null: `held-out` beside the training shards, where
    `pack --held-out` puts it."""
    cache_dir: str | None = None
    """Folder that keeps statistics of real samples and detectors. null: `$DISTGAN_CACHE`, or `~/.cache/distgan`."""

    def resolved(self, metric: MetricConfig) -> MetricConfig:
        """Return a metric with its `samples`, and its `detector` if it needs one."""
        detector: DetectorConfig | None = metric.detector or self.detector
        if not metric.needs_detector:
            detector = None
        elif detector and detector.is_default and detector.detector == self.detector.detector:
            detector = self.detector
        return metric.model_copy(update={"detector": detector, "samples": metric.samples or self.num_samples})

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        metrics = [self.resolved(metric) for metric in self.metrics or []]
        names = [metric.value_name for metric in metrics]
        for metric in metrics:
            if names.count(metric.value_name) > 1:
                raise ValueError(
                    f"metrics: {metric.value_name} is named twice; leave one out, or give it a name of its own, as in "
                    f"{{metric: {metric.metric}, name: {metric.label}-2}}"
                )
            if metric.label in RESERVED:
                raise ValueError(
                    f"metrics: {metric.metric}: metrics.jsonl has another {metric.label!r}; give the metric a name, as "
                    f"in {{metric: {metric.metric}, name: my-{metric.label}}}"
                )
        facts = metrics[0].facts if metrics else None
        is_known = type(facts) is not MetricOptions  # or its code is not allowed, or not here
        if facts is not None and is_known and facts.higher_is_better is None:
            raise ValueError(
                f"metrics: {metrics[0].metric} does not say whether higher is better, so that it cannot choose the "
                "best checkpoint; set higher_is_better in its class, or put another metric first"
            )
        used = [metric.detector for metric in metrics if metric.metric == "classes" and metric.detector]
        if not all(detector.is_trained_on_labels for detector in used):
            raise ValueError(
                "metrics: classes needs the classes of the data, which only the detectors classifier and "
                "stacked_digits tell apart; set evaluation.detector=classifier, or write {metric: classes, detector: "
                "classifier}"
            )
        return self
