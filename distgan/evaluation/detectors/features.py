"""Detectors: frozen networks that map images to the features that metrics compare."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from distgan.config import EvaluationConfig
from distgan.errors import UserError
from distgan.evaluation.precision import plain_float32
from distgan.files import cache_folder

if TYPE_CHECKING:
    from pathlib import Path


class Features(NamedTuple):
    """Detector outputs for n images: features (n, d) and logits (n, k), float32."""

    features: Tensor
    logits: Tensor


class Detector(nn.Module):
    """Frozen network from uint8 images to features and logits, in full float32 with deterministic kernels.

    Its network is in eval mode, in `train()` too. It follows the images to their device.
    """

    def __init__(
        self,
        name: str,
        dimension: int,
        num_logits: int,
        hash: str,
        network: nn.Module,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Freeze the network.

        Args:
            name: `classifier`, `inception` or the class of a user's network.
            dimension: number of features per image.
            num_logits: number of classes, 0 without logits.
            hash: identifies the weights and the preprocessing.
            network: maps images (n, C, R, R), uint8, to features (n, dimension) and logits (n, num_logits), float32.
            image_shape: the only (C, R, R) that the network takes; None if it takes several.
        """
        super().__init__()
        self.name, self.dimension, self.num_logits, self.hash = name, dimension, num_logits, hash
        self.network = network.requires_grad_(False)
        self.image_shape = image_shape
        self.eval()

    def train(self, mode: bool = True) -> Detector:
        """Stay in eval mode, as part of a module that trains too."""
        return super().train(False)

    def forward(self, images: Tensor) -> Features:
        """Compute features and logits of images (n, C, R, R), uint8, on their device.

        Raises:
            UserError: the images have a shape that the network does not take, or gives another number of features for.
        """
        shape = tuple(images.shape[1:])
        if self.image_shape is not None and shape != self.image_shape:
            raise UserError(
                f"images: found shape {shape}, expected {self.image_shape}, the shape that the detector {self.name} "
                "was trained on; resize the images, or load another detector"
            )
        place = next(chain(self.network.parameters(), self.network.buffers()), None)
        if place is not None and place.device != images.device:
            self.network.to(images.device)
        with torch.no_grad(), plain_float32(images.device):
            found = Features(*self.network(images))
        widths = found.features.shape[1], found.logits.shape[1]
        if widths != (self.dimension, self.num_logits):
            raise UserError(
                f"detector {self.name}: found {widths[0]} features and {widths[1]} logits of images of shape {shape}, "
                f"expected {self.dimension} and {self.num_logits}; pass image_shape={shape} to load_detector"
            )
        return found


def evaluation_folder(config: EvaluationConfig) -> Path:
    """Return the cache folder of detectors and real statistics."""
    return cache_folder(config.cache_dir) / "evaluation"
