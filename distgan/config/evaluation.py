"""What is measured of a generator, and with which detector."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from distgan.config.fields import Batch, Count, CountOrZero, Section
from distgan.config.named import BuiltIn, NamedSection

Taken = Literal["samples", "features", "logits", "numbers"]


class MetricOptions(Section):
    """Options of a metric. Class variables are facts that an evaluation depends on."""

    kinds: ClassVar[tuple[str, ...]] = ("images", "text", "points")
    """Kinds of data that it measures."""
    takes: ClassVar[Taken | tuple[Taken, ...]] = "samples"
    """What its `update` gets, in this order: see `distgan.evaluation.samples.FeatureBatch`."""
    higher_is_better: ClassVar[bool | None] = None
    """Direction of improvement, as `torchmetrics.Metric` has it."""
    main_value: ClassVar[str] = ""
    """Suffix of the value that ranks checkpoints, if it has several."""


class _FIDOptions(MetricOptions):
    kinds = ("images",)
    takes = "features"
    higher_is_better = False


class _KIDOptions(MetricOptions):
    kinds = ("images",)
    takes = ("features", "numbers")
    higher_is_better = False


class _ClassesOptions(MetricOptions):
    kinds = ("images",)
    takes = "logits"
    higher_is_better = True


class _InceptionScoreOptions(MetricOptions):
    kinds = ("images",)
    takes = ("logits", "numbers")
    higher_is_better = True


class _ModesOptions(MetricOptions):
    kinds = ("points",)
    higher_is_better = True


class _NgramOptions(MetricOptions):
    kinds = ("text",)
    takes = ("samples", "numbers")
    higher_is_better = False
    main_value = "[4]"


METRICS = {
    "fid": BuiltIn("distgan.evaluation.metrics.frechet:FID", _FIDOptions),
    "inception_score": BuiltIn("distgan.evaluation.metrics.inception_score:InceptionScore", _InceptionScoreOptions),
    "kid": BuiltIn("distgan.evaluation.metrics.kid:KID", _KIDOptions),
    "classes": BuiltIn("distgan.evaluation.metrics.class_coverage:Classes", _ClassesOptions),
    "modes": BuiltIn("distgan.evaluation.metrics.mode_coverage:CoveredModes", _ModesOptions),
    "ngram_js": BuiltIn("distgan.evaluation.metrics.ngrams:NgramJS", _NgramOptions),
}
RESERVED = ("step", "images", "time")
"""Names of other numbers in the rows of metrics.jsonl."""
DEFAULT_METRIC = {"images": "fid", "text": "ngram_js", "points": "modes"}


def _value_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]{1,60}", name):
        raise ValueError(f"{name[:80]!r} cannot name a value; use up to 60 letters, digits, _, . and -")
    return name


class MetricConfig(NamedSection):
    """A metric of the generated samples. A name alone stands for `{metric: NAME}`."""

    naming_key: ClassVar = "metric"
    built_in: ClassVar = METRICS
    offered: ClassVar = ("context", "reals")
    facts_base: ClassVar = MetricOptions

    metric: str
    """Metric: `fid`, `inception_score`, `kid` or `classes` for images, `ngram_js` for text, `modes` for points, or the
    import path of a `torchmetrics.Metric` of your own."""
    name: Annotated[str, AfterValidator(_value_name)] | None = None
    """Name of its values, to tell two metrics of one class apart. null: that of the metric, or of the class."""

    @property
    def label(self) -> str:
        """Name of its values."""
        return self.name or self.metric.rpartition(":")[2]

    @property
    def facts(self) -> MetricOptions:
        """The options, or their base class if the code is not allowed."""
        found: MetricOptions = super().facts
        return found

    @property
    def inputs(self) -> tuple[Taken, ...]:
        """What its `update` gets."""
        takes = self.facts.takes
        return takes if isinstance(takes, tuple) else (takes,)

    @property
    def needs_detector(self) -> bool:
        """Whether it takes a detector's features or logits."""
        return not {"features", "logits"}.isdisjoint(self.inputs)

    @model_serializer(mode="wrap")
    def _write_a_name_alone_as_text(self, write: SerializerFunctionWrapHandler) -> Any:
        values = write(self)
        if self.name is None:
            values.pop("name", None)
        return values["metric"] if values.keys() == {"metric"} else values


class DetectorConfig(NamedSection):
    """The feature extractor of the metrics. A name alone stands for `{detector: NAME}`."""

    naming_key: ClassVar = "detector"
    built_in: ClassVar = {
        "classifier": BuiltIn("distgan.evaluation.detectors.configured:load_trained_classifier", Section),
        "inception": BuiltIn("distgan.evaluation.detectors.configured:load_inception", Section),
    }
    offered: ClassVar = ("context",)

    detector: str = "classifier"
    """`classifier`: a classifier trained on the labeled shards. `inception`: the Inception-v3 of 2015. Or the import
    path of a network of your own, from uint8 images to features, or to features and logits."""

    @property
    def label(self) -> str:
        """Its name in the names of values."""
        return self.detector.rpartition(":")[2]


class EvaluationConfig(Section):
    """Metrics of the EMA generator."""

    every: CountOrZero = 0
    """Steps between evaluations; 0 evaluates only by `distgan evaluate`."""
    num_samples: Annotated[Count, Field(le=2**24)] = 10_000
    """Number of generated samples per evaluation."""
    batch_size: Batch = 64
    """Number of samples per forward pass on one rank."""
    metrics: Annotated[list[MetricConfig], Field(min_length=1)] | None = None
    """Metrics to compute; the first one decides which checkpoint is best. null: `fid` for images, `ngram_js` for text,
    `modes` for points. Images also have `inception_score` and `kid`, and `classes` with the classifier: the number of
    classes with at least a tenth of their share in the data. Your own are import paths, or sections with options
    and, for two of one class, a `name`."""
    detector: DetectorConfig = DetectorConfig()
    """Feature extractor of the metrics: its name, or a section with its options."""
    inception_weights: str | None = None
    """Path of torch-fidelity's pt_inception-2015-12-05 weights; null downloads them."""
    held_out: str | None = None
    """Folder of text shards that are not trained on, for `ngram_js`. null: `held-out` beside the training shards, where
    `pack --held-out` puts it."""
    cache_dir: str | None = None
    """Folder that keeps statistics of real samples and detectors. null: `$DISTGAN_CACHE`, or `~/.cache/distgan`."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if self.inception_weights is not None and self.detector.detector != "inception":
            raise ValueError(
                f"inception_weights: has no effect with detector: {self.detector.detector}, only with inception; leave "
                "it out, or change detector"
            )
        metrics = self.metrics or []
        labels = [metric.label for metric in metrics]
        for metric in metrics:
            if labels.count(metric.label) > 1:
                raise ValueError(
                    f"metrics: {metric.label} is named twice; leave one out, or give it a name of its own, as in "
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
        if any(metric.metric == "classes" for metric in metrics) and self.detector.detector != "classifier":
            raise ValueError(
                "metrics: classes needs the classes of the data, which only evaluation.detector=classifier tells apart"
            )
        return self
