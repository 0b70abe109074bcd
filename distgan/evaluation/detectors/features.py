"""Detectors: frozen networks that map images to the features that metrics compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from distgan.config import DataConfig, EvaluationConfig, cache_folder
from distgan.data.index.table import Index
from distgan.distributed.control import Asked, never
from distgan.evaluation.detectors import classifier
from distgan.evaluation.precision import plain_float32
from distgan.packages import missing_package

if TYPE_CHECKING:
    from pathlib import Path

    from distgan.distributed.runtime import Runtime


class Features(NamedTuple):
    """Detector outputs for n images: features (n, d) and logits (n, k), float32."""

    features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Detector:
    """Frozen network from uint8 images to features and logits, in full float32 with deterministic kernels."""

    name: Literal["classifier", "inception"]
    dimension: int
    """Number of features per image."""
    num_logits: int
    """Number of classes."""
    hash: str
    """Identifies the weights and the preprocessing."""
    network: nn.Module

    def __call__(self, images: Tensor) -> Features:
        """Compute features and logits of images (n, C, R, R), uint8, on the network's device."""
        with torch.no_grad(), plain_float32(images.device):
            return Features(*self.network(images))


def load_configured_detector(
    config: EvaluationConfig, data: DataConfig, index: Index, runtime: Runtime, asked: Asked = never
) -> Detector:
    """Load the configured detector, with the same weights on every rank. Collective: call on every rank.

    Raises:
        UserError: the classifier has no labels to train on, or Inception's package or weights are missing or damaged.
        Interrupted: a rank was asked to stop during the classifier's training.
    """
    folder = evaluation_folder(config)
    network: nn.Module
    if config.detector == "inception":
        try:
            from distgan.evaluation.detectors import inception
        except ImportError:
            raise missing_package(
                "evaluation.detector = inception", "torch-fidelity", "set evaluation.detector=classifier"
            ) from None
        network, hash = inception.load_inception(config.inception_weights, folder, runtime)
        dimension, num_logits = inception.DIMENSION, inception.NUM_LOGITS
    else:
        network, hash = classifier.load_classifier(data, index, folder, runtime, asked)
        dimension, num_logits = classifier.DIMENSION, index.num_classes
    network = network.eval().requires_grad_(False).to(runtime.device)
    return Detector(config.detector, dimension, num_logits, hash, network)


def evaluation_folder(config: EvaluationConfig) -> Path:
    """Return the cache folder of detectors and real statistics."""
    return cache_folder(config.cache_dir) / "evaluation"
