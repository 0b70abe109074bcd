"""Networks whose features the metrics compare."""

from __future__ import annotations

from typing import ClassVar

from distgan.config.fields import Section
from distgan.config.named import BuiltIn, NamedSection


class _PublishedOptions(Section):
    weights: str | None = None
    """Path of the weights; null uses those in a cache, downloaded on first use: in `evaluation.cache_dir`, for `dinov2`
    and `clip` in the cache of huggingface_hub."""


PUBLISHED_DETECTORS = {
    "inception": "torch-fidelity", "dinov2": "transformers", "clip": "transformers", "vgg16": "torch-fidelity",
}  # fmt: skip
"""Detectors with published weights, which are modules of `distgan.evaluation.detectors`, and the package each needs."""
_LOADING = "distgan.evaluation.detectors.configured"


class DetectorConfig(NamedSection):
    """The feature extractor of metrics. A name alone stands for `{detector: NAME}`."""

    naming_key: ClassVar = "detector"
    built_in: ClassVar = {
        "classifier": BuiltIn(f"{_LOADING}:TrainedClassifier", Section),
        "stacked_digits": BuiltIn(f"{_LOADING}:StackedDigitsClassifier", Section),
        **dict.fromkeys(PUBLISHED_DETECTORS, BuiltIn(f"{_LOADING}:load_published_detector", _PublishedOptions)),
    }
    offered: ClassVar = ("context",)

    detector: str = "classifier"
    """`classifier`: a classifier trained on the labeled shards. `stacked_digits`: one of single digits, for each
    channel of StackedMNIST. `inception`: the Inception-v3 of 2015. `dinov2`: DINOv2 ViT-L/14. `clip`: CLIP ViT-B/32.
    `vgg16`: VGG-16. Or the import path of a network of your own, from uint8 images to features, or to features and
    logits."""

    @property
    def label(self) -> str:
        """Its name in the names of values."""
        return self.detector.rpartition(":")[2]

    @property
    def is_trained_on_labels(self) -> bool:
        """True if it is trained on the labeled shards, so that its logits are of their classes."""
        return self.detector in ("classifier", "stacked_digits")

    @property
    def is_default(self) -> bool:
        """True if it is a built-in detector without options of its own."""
        options = self.options if self.is_built_in else None
        return options is not None and options == type(options)()

    @property
    def key(self) -> str:
        """Text that is equal for equal sections."""
        return self.model_dump_json()
