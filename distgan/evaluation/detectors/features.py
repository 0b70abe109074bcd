"""Detectors: networks whose features of real and generated images are compared."""

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
    """What a detector sees in n images: features (n, d) and logits (n, k), float32."""

    features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Detector:
    """A frozen network from uint8 images to features and logits, in full float32 by deterministic kernels."""

    name: Literal["classifier", "inception"]
    dimension: int
    """Features of an image."""
    num_logits: int
    """Classes that it tells apart."""
    hash: str
    """Stands for its weights and its preprocessing."""
    network: nn.Module

    def __call__(self, images: Tensor) -> Features:
        """Of images (n, C, R, R), uint8, on the network's device."""
        with torch.no_grad(), plain_float32(images.device):
            return Features(*self.network(images))


def load_detector(
    config: EvaluationConfig, data: DataConfig, index: Index, runtime: Runtime, asked: Asked = never
) -> Detector:
    """The detector that the config names, with the same weights on every rank. Call it on all of them.

    Raises:
        UserError: no labels to train the classifier on; Inception's package or weights missing, or damaged.
        Interrupted: a rank was asked to stop while the classifier was trained.
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
    """Where detectors and real statistics are cached."""
    return cache_folder(config.cache_dir) / "evaluation"
