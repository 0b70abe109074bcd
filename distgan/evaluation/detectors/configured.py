"""The detector that a run's config names, with the same weights on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from distgan.config import DataConfig, EvaluationConfig
from distgan.data.index.table import Index
from distgan.distributed.control import Asked, never
from distgan.errors import UserError, blaming
from distgan.evaluation import statistics_cache
from distgan.evaluation.detectors import classifier
from distgan.evaluation.detectors.features import Detector, evaluation_folder
from distgan.evaluation.detectors.loading import load_detector
from distgan.extensions import package_digest, package_of
from distgan.packages import missing_package

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime


def load_configured_detector(
    config: EvaluationConfig, data: DataConfig, index: Index, runtime: Runtime, asked: Asked = never
) -> Detector:
    """Load the configured detector. Collective: call on every rank.

    Raises:
        UserError: the classifier has no labels to train on, Inception's package or weights are missing or damaged, or a
            detector of the user's is no network, fails, or differs between ranks.
        Interrupted: a rank was asked to stop during the classifier's training.
    """
    if config.detector.is_built_in:
        detector = config.detector.build(config, data, index, runtime, asked)
        assert isinstance(detector, Detector)
        return detector.to(runtime.device)
    with runtime.raise_on_all_ranks(), blaming(f"evaluation.detector = {config.detector.detector}"):
        network = config.detector.build()
        if not isinstance(network, nn.Module):
            raise UserError(f"returned {type(network).__name__}, expected a torch.nn.Module")
        found = load_detector(network, image_shape=(data.channels, data.resolution, data.resolution))
        # Weights do not tell options or code apart, and cached statistics must.
        code = package_digest(package_of(config.detector.path))
        named = Detector(
            config.detector.label,
            found.dimension,
            found.num_logits,
            statistics_cache.key(found.hash, config.detector.model_dump_json(), code),
            found.network,
            found.image_shape,
        )
    runtime.check_equal("the detector", named.hash, "give it the same weights on every rank, such as those of a file")
    return named.to(runtime.device)


def load_trained_classifier(
    config: EvaluationConfig, data: DataConfig, index: Index, runtime: Runtime, asked: Asked
) -> Detector:
    """Load the classifier of these shards from the cache, or train it. Collective: call on every rank."""
    network, hash = classifier.load_classifier(data, index, evaluation_folder(config), runtime, asked)
    return Detector("classifier", classifier.DIMENSION, index.num_classes, hash, network)


def load_inception(
    config: EvaluationConfig, data: DataConfig, index: Index, runtime: Runtime, asked: Asked
) -> Detector:
    """Load the Inception-v3 of 2015. Collective: call on every rank."""
    try:
        from distgan.evaluation.detectors import inception
    except ImportError:
        raise missing_package(
            "evaluation.detector = inception", "torch-fidelity", "set evaluation.detector=classifier"
        ) from None
    network, hash = inception.load_inception(config.inception_weights, evaluation_folder(config), runtime)
    return Detector("inception", inception.DIMENSION, inception.NUM_LOGITS, hash, network)
