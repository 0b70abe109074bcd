"""The detectors that a run's config names, with the same weights on every rank."""

from __future__ import annotations

from torch import nn

from distgan.config import DetectorConfig
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
            damaged, or a
            detector of the user's is no network, fails, or differs between ranks.
        Interrupted: a rank was asked to stop during the classifier's training.
    """
    data, runtime = context.config.data, context.runtime
    with runtime.raise_on_all_ranks():
        network = section.build(context=context)
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


def load_trained_classifier(context: EvaluationContext) -> Detector:
    """Load the classifier of these shards from the cache, or train it. Collective: call on every rank."""
    data, index, folder = context.config.data, context.index, evaluation_folder(context.config.evaluation)
    network, hash = classifier.load_classifier(data, index, folder, context.runtime, context.asked)
    return Detector("classifier", classifier.DIMENSION, index.num_classes, hash, network)


def load_stacked_digits(context: EvaluationContext) -> Detector:
    """Load the classifier of the channels of stacked digits from the cache, or train it. Collective."""
    data, index, folder = context.config.data, context.index, evaluation_folder(context.config.evaluation)
    network, hash = stacked_digits.load_stacked_digits(data, index, folder, context.runtime, context.asked)
    return Detector("stacked_digits", stacked_digits.DIMENSION, stacked_digits.CLASSES, hash, network)


def load_inception(context: EvaluationContext, weights: str | None = None) -> Detector:
    """Load the Inception-v3 of 2015. Collective: call on every rank."""
    return _published("inception", context, weights)


def load_dinov2(context: EvaluationContext, weights: str | None = None) -> Detector:
    """Load DINOv2 ViT-L/14. Collective: call on every rank."""
    return _published("dinov2", context, weights)


def load_clip(context: EvaluationContext, weights: str | None = None) -> Detector:
    """Load the image encoder of CLIP ViT-B/32. Collective: call on every rank."""
    return _published("clip", context, weights)


def load_vgg16(context: EvaluationContext, weights: str | None = None) -> Detector:
    """Load VGG-16. Collective: call on every rank."""
    return _published("vgg16", context, weights)


def _published(name: str, context: EvaluationContext, weights: str | None) -> Detector:
    return load_published(name, weights, evaluation_folder(context.config.evaluation), context.runtime)
