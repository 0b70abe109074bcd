"""What is measured of a generator, and with which detector."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgan.config.fields import Batch, Count, CountOrZero, Section
from distgan.config.named import BuiltIn, NamedSection


class MetricOptions(Section):
    """Options of a metric. Class variables are facts that an evaluation depends on."""

    kinds: ClassVar[tuple[str, ...]] = ("images", "text", "points")
    """Kinds of data that it measures."""
    takes: ClassVar[Literal["features", "logits", "samples"]] = "samples"
    """What its `update` gets: the detector's features (n, d) or logits (n, k), or the samples."""
    higher_is_better: ClassVar[bool | None] = None
    """Direction of improvement, as `torchmetrics.Metric` has it."""
    main_value: ClassVar[str] = ""
    """Suffix of the value that ranks checkpoints, if it has several."""


class _FIDOptions(MetricOptions):
    kinds = ("images",)
    takes = "features"
    higher_is_better = False


class _InceptionScoreOptions(MetricOptions):
    kinds = ("images",)
    takes = "logits"
    higher_is_better = True


class _ModesOptions(MetricOptions):
    kinds = ("points",)
    higher_is_better = True


class _NgramOptions(MetricOptions):
    kinds = ("text",)
    higher_is_better = False
    main_value = "[4]"


METRICS = {
    "fid": BuiltIn("distgan.evaluation.suite_metrics:fid", _FIDOptions),
    "inception_score": BuiltIn("distgan.evaluation.suite_metrics:inception_score", _InceptionScoreOptions),
    "kid": BuiltIn("distgan.evaluation.suite_metrics:kid", _FIDOptions),
    "classes": BuiltIn("distgan.evaluation.suite_metrics:classes", _InceptionScoreOptions),
    "modes": BuiltIn("distgan.evaluation.suite_metrics:modes", _ModesOptions),
    "ngram_js": BuiltIn("distgan.evaluation.suite_metrics:ngram_js", _NgramOptions),
}
DEFAULT_METRIC = {"images": "fid", "text": "ngram_js", "points": "modes"}


class MetricConfig(NamedSection):
    """A metric of the generated samples. A name alone stands for `{metric: NAME}`."""

    naming_key: ClassVar = "metric"
    built_in: ClassVar = METRICS
    facts_base: ClassVar = MetricOptions

    metric: str
    """Metric: `fid`, `inception_score`, `kid` or `classes` for images, `ngram_js` for text, `modes` for points, or the
    import path of a `torchmetrics.Metric` of your own."""

    @property
    def label(self) -> str:
        """Name of its values: that of the built-in metric, or of the class."""
        return self.metric.rpartition(":")[2]

    @property
    def facts(self) -> MetricOptions:
        """The options, or their base class if the code is not allowed."""
        found: MetricOptions = super().facts
        return found


class DetectorConfig(NamedSection):
    """The feature extractor of the metrics. A name alone stands for `{detector: NAME}`."""

    naming_key: ClassVar = "detector"
    built_in: ClassVar = {
        "classifier": BuiltIn("distgan.evaluation.detectors.configured:load_trained_classifier", Section),
        "inception": BuiltIn("distgan.evaluation.detectors.configured:load_inception", Section),
    }

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
    classes with at least a tenth of their share in the data. Your own are import paths, or sections with options."""
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
        labels = [metric.label for metric in self.metrics or []]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(f"metrics: {twice[0]} is named twice")
        first = self.metrics[0] if self.metrics else None
        if first is not None and not first.is_built_in and first.is_allowed and first.facts.higher_is_better is None:
            raise ValueError(
                f"metrics: {first.metric} does not say whether higher is better, so that it cannot choose the best "
                "checkpoint; set higher_is_better in its class, or put another metric first"
            )
        if "classes" in labels and self.detector.detector != "classifier":
            raise ValueError(
                "metrics: classes needs the classes of the data, which only evaluation.detector=classifier tells apart"
            )
        return self
