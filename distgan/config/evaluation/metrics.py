"""Metrics of a generator: their names, options, and facts that an evaluation depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from distgan.config.evaluation.detectors import DetectorConfig
from distgan.config.fields import Count, Positive, Section
from distgan.config.named import BuiltIn, NamedSection

Taken = Literal["samples", "features", "logits", "numbers", "generator"]


class MetricOptions(Section):
    """Options of a metric. Class variables are facts that an evaluation depends on."""

    kinds: ClassVar[tuple[str, ...]] = ("images", "text", "points", "latents")
    """Kinds of data that it measures."""
    takes: ClassVar[Taken | tuple[Taken, ...]] = "samples"
    """Fields that its `update` gets, in this order: see `distgan.evaluation.samples.FeatureBatch`."""
    higher_is_better: ClassVar[bool | None] = None
    """Direction of improvement, as `torchmetrics.Metric` has it."""
    main_value: ClassVar[str] = ""
    """Suffix of the value that ranks checkpoints, if it has several."""

    @property
    def qualifiers(self) -> tuple[str, ...]:
        """Parts of the brackets in the names of its values, besides the detector."""
        return ()


class _FIDOptions(MetricOptions):
    kinds = ("images",)
    takes: ClassVar[Taken | tuple[Taken, ...]] = "features"
    higher_is_better = False

    real_statistics: str | None = None
    """Path of an .npz file with mean `mu` and covariance `sigma` to compare with, in place of the real images. The
    names of the values say so: `fid[inception,real=FILE]`."""

    @property
    def qualifiers(self) -> tuple[str, ...]:
        return (f"real={_file_name(self.real_statistics)}",) if self.real_statistics else ()


class _KIDOptions(MetricOptions):
    kinds = ("images",)
    takes = ("features", "numbers")
    higher_is_better = False


class _ClassesOptions(MetricOptions):
    kinds = ("images",)
    takes = "logits"
    higher_is_better = True

    min_samples: Count | None = None
    """Fewest samples of a class that count as found. null: a tenth of its share in the data."""


class _InceptionScoreOptions(MetricOptions):
    kinds = ("images",)
    takes = ("logits", "numbers")
    higher_is_better = True


class _PPLOptions(MetricOptions):
    kinds = ("images",)
    takes = ("generator", "numbers")
    higher_is_better = False

    space: Literal["w", "z"] = "w"
    """Space of the paths. `w`: straight lines between styles, the outputs of the mapping network. `z`: arcs between
    latents."""
    sampling: Literal["end", "full"] = "end"
    """Place on a path where its length is measured. `end`: the start, as reported for StyleGAN2. `full`: a random
    place."""
    epsilon: Annotated[Positive, Field(le=0.1)] = 1e-4
    """Step along the path, as a share of it."""
    crop: bool = False
    """Compare only the center of aligned faces, as StyleGAN did."""
    weights: str | None = None
    """Path of torchvision's VGG16, vgg16-397923af.pth, or its tensors as .safetensors. null: that in
    `evaluation.cache_dir`, or torchvision's own copy; downloaded on first use."""

    @property
    def qualifiers(self) -> tuple[str, ...]:
        others = (["crop"] if self.crop else []) + ([f"epsilon={self.epsilon}"] if self.epsilon != 1e-4 else [])
        return ("vgg16", self.space, self.sampling, *others)


class _ModesOptions(MetricOptions):
    kinds = ("points",)
    higher_is_better = True


class _NgramOptions(MetricOptions):
    kinds = ("text",)
    takes = ("samples", "numbers")
    higher_is_better = False
    main_value = "[4]"


class _PrecisionRecallOptions(MetricOptions):
    kinds = ("images",)
    takes = ("features", "numbers")
    higher_is_better = True
    main_value = "_recall"

    neighbors: Count = 3
    """k: an image's ball reaches to its k-th nearest neighbor of the same side."""
    max_reals: Count = 50_000
    """Most real images to compare with. Every rank holds their features in host memory."""


class _FIDInfinityOptions(_FIDOptions):
    takes = ("features", "numbers")


class _MiFIDOptions(MetricOptions):
    kinds = ("images",)
    takes = ("features", "numbers")
    higher_is_better = False

    max_reals: Count = 200_000
    """Most real images that a generated one may be a copy of. Every rank holds their features in host memory."""


class _SlicedWassersteinOptions(MetricOptions):
    kinds = ("images",)
    takes = ("samples", "numbers")
    higher_is_better = False

    max_images: Count = 16_384
    """Most images of each side to compare. Of 16,384 color images the descriptors take 1.2 GB per scale and side."""


class _DensityCoverageOptions(MetricOptions):
    kinds = ("images",)
    takes = ("features", "numbers")
    higher_is_better = True
    main_value = "_coverage"

    neighbors: Count = 5
    """k: a real image's ball reaches to its k-th nearest real neighbor."""
    max_reals: Count = 10_000
    """Most real images to compare with. Every rank holds their features in host memory."""


METRICS = {
    "fid": BuiltIn("distgan.evaluation.metrics.frechet:FID", _FIDOptions),
    "inception_score": BuiltIn("distgan.evaluation.metrics.inception_score:InceptionScore", _InceptionScoreOptions),
    "kid": BuiltIn("distgan.evaluation.metrics.kid:KID", _KIDOptions),
    "precision_recall": BuiltIn("distgan.evaluation.metrics.precision_recall:PrecisionRecall", _PrecisionRecallOptions),
    "density_coverage": BuiltIn("distgan.evaluation.metrics.density_coverage:DensityCoverage", _DensityCoverageOptions),
    "fid_infinity": BuiltIn("distgan.evaluation.metrics.fid_infinity:FIDInfinity", _FIDInfinityOptions),
    "mifid": BuiltIn("distgan.evaluation.metrics.mifid:MiFID", _MiFIDOptions),
    "sliced_wasserstein": BuiltIn(
        "distgan.evaluation.metrics.sliced_wasserstein:SlicedWasserstein", _SlicedWassersteinOptions
    ),
    "classes": BuiltIn("distgan.evaluation.metrics.class_coverage:Classes", _ClassesOptions),
    "ppl": BuiltIn("distgan.evaluation.metrics.perceptual_path_length:PerceptualPathLength", _PPLOptions),
    "modes": BuiltIn("distgan.evaluation.metrics.mode_coverage:CoveredModes", _ModesOptions),
    "ngram_js": BuiltIn("distgan.evaluation.metrics.ngrams:NgramJS", _NgramOptions),
}
ALIASES: dict[str, dict[str, Any]] = {
    "fid50k_full": {"metric": "fid", "detector": "inception", "samples": 50_000},
    "kid50k_full": {"metric": "kid", "detector": "inception", "samples": 50_000},
    "pr50k3_full": {
        "metric": "precision_recall", "detector": "vgg16", "samples": 50_000, "neighbors": 3, "max_reals": 200_000,
    },
    "is50k": {"metric": "inception_score", "detector": "inception", "samples": 50_000},
    "ppl2_wend": {"metric": "ppl", "space": "w", "sampling": "end", "samples": 50_000},
    "stacked_mnist": {"metric": "classes", "detector": "stacked_digits", "samples": 26_000, "min_samples": 1},
}  # fmt: skip
"""Published protocols: the keys of a metric that each stands for. Names are StyleGAN's, where it has one."""
RESERVED = ("step", "images", "time")
"""Names of other numbers in the rows of metrics.jsonl."""
MOST_SAMPLES = 2**24
DEFAULT_METRIC = {"images": "fid", "text": "ngram_js", "points": "modes"}


def _file_name(path: str) -> str:
    return re.sub(r"[^\w.-]", "_", PurePath(path).stem)[:60]


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
    aliases: ClassVar = tuple(ALIASES)

    metric: str
    """Metric: `fid`, `fid_infinity`, `mifid`, `inception_score`, `kid`, `precision_recall`, `density_coverage`,
    `sliced_wasserstein`, `ppl` or `classes` for images, `ngram_js` for text, `modes` for points, or the import path of
    a `torchmetrics.Metric` of your own. `fid50k_full`, `kid50k_full`, `is50k`, `pr50k3_full` and `ppl2_wend` are `fid`,
    `kid`, `inception_score`, `precision_recall` and `ppl` after StyleGAN's protocols of these names; docs/metrics.md
    has the differences. `stacked_mnist` is `classes` with `stacked_digits` and 26,000 samples, of which one finds a
    class."""
    name: Annotated[str, AfterValidator(_value_name)] | None = None
    """Name of its values, to tell two metrics of one class apart. null: that of the metric, or of the class."""
    detector: DetectorConfig | None = None
    """Feature extractor of this metric. null: `evaluation.detector`. A name alone that is also the name of
    `evaluation.detector` stands for that section, with its options."""
    samples: Annotated[Count, Field(le=MOST_SAMPLES)] | None = None
    """Number of generated samples that this metric gets. null: `evaluation.num_samples`."""

    @property
    def label(self) -> str:
        """Name of its values, without the detector's."""
        return self.name or self.metric.rpartition(":")[2]

    @property
    def value_name(self) -> str:
        """Name of its values, such as `fid[classifier]` or `modes`. It tells the metrics of an evaluation apart."""
        return self.label + self.brackets

    @property
    def brackets(self) -> str:
        """End of the names of its values, which says by what it measures: `[classifier]`, or nothing."""
        detector = [self.detector.label] if self.detector and self.needs_detector else []
        parts = ",".join([*detector, *self.facts.qualifiers])
        return f"[{parts}]" if parts else ""

    @property
    def facts(self) -> MetricOptions:
        """The options, or their base class if the code is not allowed."""
        found: MetricOptions = super().facts
        return found

    @property
    def inputs(self) -> tuple[Taken, ...]:
        """Fields that its `update` gets."""
        takes = self.facts.takes
        return takes if isinstance(takes, tuple) else (takes,)

    @property
    def needs_detector(self) -> bool:
        """True if it takes a detector's features or logits."""
        return not {"features", "logits"}.isdisjoint(self.inputs)

    @property
    def needs_samples(self) -> bool:
        """True if it takes samples or what is made of them."""
        return not {"generator", "numbers"}.issuperset(self.inputs)

    @model_validator(mode="before")
    @classmethod
    def _expand_an_alias(cls, values: Any) -> Any:
        given = {"metric": values} if isinstance(values, str) else values
        alias = given.get("metric") if isinstance(given, Mapping) else None
        fixed = ALIASES.get(alias) if isinstance(alias, str) else None
        if fixed is None:
            return values
        for key in [key for key in fixed if key != "metric" and given.get(key) is not None]:
            found = given[key]
            if key == "detector":  # which may have options, such as the path of its weights
                found = DetectorConfig.model_validate(found).detector
            if str(found) != str(fixed[key]):
                raise ValueError(
                    f"{key}: {alias} has {key} = {fixed[key]}, found {str(found)[:80]}; leave it out, or set it in "
                    f"{{metric: {fixed['metric']}, ...}}"
                )
        own = {key: value for key, value in given.items() if value is not None}
        return {"name": alias, **fixed, **own, "metric": fixed["metric"]}

    @model_validator(mode="after")
    def _check_detector(self) -> MetricConfig:
        is_known = type(self.facts) is not MetricOptions  # or its code is not allowed, or not here
        if self.detector is not None and is_known and not self.needs_detector:
            raise ValueError(
                f"detector: has no effect with metric: {self.metric}, which takes no features; leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _write_a_name_alone_as_text(self, write: SerializerFunctionWrapHandler) -> Any:
        values = write(self)
        for key in ("name", "detector", "samples", "real_statistics"):
            if values.get(key) is None:
                values.pop(key, None)
        return values["metric"] if values.keys() == {"metric"} else values
