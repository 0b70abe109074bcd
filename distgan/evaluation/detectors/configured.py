"""The detectors that a run's config names, with the same weights on every rank."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from distgan.config import Config, DetectorConfig
from distgan.data.index.table import Index
from distgan.errors import UserError, blaming
from distgan.evaluation import statistics_cache
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors import classifier, stacked_digits
from distgan.evaluation.detectors.features import Detector, evaluation_folder
from distgan.evaluation.detectors.loading import load_detector
from distgan.evaluation.detectors.published import load_published
from distgan.extensions import code_digest_of


def load_configured_detector(section: DetectorConfig, context: EvaluationContext) -> Detector:
    """Load a detector. Collective: call on every rank.

    A technique that makes a plain network gets a hash of its weights, options and code.

    Raises:
        UserError: the classifier has no labels to train on, the package or weights of a published one are missing or
            damaged, or a detector of the user's is no network, fails, or differs between ranks.
        Interrupted: a rank was asked to stop during the classifier's training.
    """
    data, runtime = context.config.data, context.runtime
    with runtime.raise_on_all_ranks():
        network = section.build(context=replace(context, name=section.detector))
        with blaming(f"detector {section.detector}"):
            if not isinstance(network, nn.Module):
                raise UserError(f"returned {type(network).__name__}, expected a torch.nn.Module")
            if isinstance(network, Detector):
                detector = network
            else:
                found = load_detector(network, image_shape=(data.channels, data.resolution, data.resolution))
                # Weights do not tell options or code apart, and cached statistics must.
                code = code_digest_of(section.path)
                hash = statistics_cache.key(found.hash, section.model_dump_json(), code)
                dimensions = found.dimension, found.num_logits
                detector = Detector(section.label, *dimensions, hash, found.network, found.image_shape)
    fix = "give it the same weights on every rank, such as those of a file"
    runtime.check_equal(f"the detector {section.label}", detector.hash, fix)
    return detector.to(runtime.device)


class TrainedClassifier(Detector):
    """The classifier of these shards, from the cache, or trained and cached. Collective: make it on every rank."""

    def __init__(self, context: EvaluationContext) -> None:
        data, index, folder = context.config.data, context.index, evaluation_folder(context.config.evaluation)
        network, hash = classifier.load_classifier(data, index, folder, context.runtime, context.asked)
        super().__init__("classifier", classifier.DIMENSION, index.num_classes, hash, network)

    @staticmethod
    def validate(config: Config, index: Index) -> None:
        """Raise UserError unless the classifier can be trained on the shards."""
        classifier.validate_classifier(config.data, index)


class StackedDigitsClassifier(Detector):
    """The classifier of the channels of stacked digits, from the cache, or trained and cached. Collective."""

    def __init__(self, context: EvaluationContext) -> None:
        data, index, folder = context.config.data, context.index, evaluation_folder(context.config.evaluation)
        network, hash = stacked_digits.load_stacked_digits(data, index, folder, context.runtime, context.asked)
        super().__init__("stacked_digits", stacked_digits.DIMENSION, stacked_digits.CLASSES, hash, network)

    @staticmethod
    def validate(config: Config, index: Index) -> None:
        """Raise UserError unless the shards are stacked digits."""
        stacked_digits.validate_stacked_digits(config.data, index)


def load_published_detector(context: EvaluationContext, weights: str | None = None) -> Detector:
    """Load the published detector that `context.name` names. Collective: call on every rank."""
    return load_published(context.name, weights, evaluation_folder(context.config.evaluation), context.runtime)
