"""Residual blocks of WGAN-GP, SNGAN and BigGAN, and the projection discriminator that is made of them.

Gulrajani et al., "Improved Training of Wasserstein GANs", NIPS 2017; Miyato et al., "Spectral Normalization for GANs",
ICLR 2018; Brock et al., "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019.

Weights start from Glorot's uniform distribution, times sqrt(2) for the 3x3 convolutions of blocks, and biases at 0, as
in the released codes of the first two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from distgan.networks.layers.normalization import BatchNorm, build_normalization, centers_channels
from distgan.networks.layers.virtual_batch_norm import VirtualBatchNorm

Weighted = TypeVar("Weighted", nn.Conv2d, nn.Linear, nn.Embedding)


class GeneratorBlock(nn.Module):
    """Norm, ReLU, enlarge, 3x3, norm, ReLU, 3x3, plus enlarge, 1x1: (n, before, r, r) to (n, after, 2r, 2r)."""

    def __init__(
        self, before: int, after: int, normalize: Callable[[int], nn.Module], *, inner_bias: bool, bias: bool
    ) -> None:
        """Build the block.

        Args:
            normalize: makes the normalization of so many channels. The layer's forward pass takes the activations, and
                the condition if the block's does.
            inner_bias: the first convolution, before the second norm, has a bias.
            bias: the convolutions that are summed to the output have one.
        """
        super().__init__()
        self.first_norm = normalize(before)
        self.first = glorot(nn.Conv2d(before, after, 3, padding=1, bias=inner_bias), math.sqrt(2.0))
        self.second_norm = normalize(after)
        self.second = glorot(nn.Conv2d(after, after, 3, padding=1, bias=bias), math.sqrt(2.0))
        self.shortcut = glorot(nn.Conv2d(before, after, 1, bias=bias))

    def forward(self, activations: Tensor, *condition: Tensor) -> Tensor:
        residual = self.first(_enlarge(F.relu(self.first_norm(activations, *condition))))
        residual = self.second(F.relu(self.second_norm(residual, *condition)))
        # A 1x1 convolution commutes with enlarging; doing it first takes a quarter of the work.
        out: Tensor = residual + _enlarge(self.shortcut(activations))
        return out


class ProjectionDiscriminator(nn.Module):
    """Images (n, C, R, R), and int64 labels (n,) if there are classes, to logits (n,).

    Labels enter by projection: the logit is a linear function of the features plus their product with the class
    embedding (Miyato and Koyama 2018).
    """

    feature_layer = "features"

    def __init__(self, features: nn.Module, width: int, num_classes: int, *, bias: bool) -> None:
        """Build the logit of features (n, width), with a bias or without."""
        super().__init__()
        self.features = features
        self.logit = glorot(nn.Linear(width, 1, bias=bias))
        self.embedding = glorot(nn.Embedding(num_classes, width)) if num_classes else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks, which can be sharded, compiled and recomputed one by one."""
        return [layer for layer in self.features.children() if isinstance(layer, (FirstBlock, DiscriminatorBlock))]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        features = self.features(images)
        logits: Tensor = self.logit(features).squeeze(1)
        if self.embedding is not None:
            assert labels is not None
            logits = logits + (self.embedding(labels) * features).sum(1)
        return logits


class DiscriminatorBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3, plus a 1x1 shortcut, then the mean over 2x2 if `halve`.

    The shortcut is the identity if neither width nor size changes.
    """

    def __init__(self, before: int, after: int, normalization: str, *, halve: bool, wide: bool = False) -> None:
        """Build the block. Between its convolutions it has `before` channels, or `after` if it is `wide` (BigGAN)."""
        super().__init__()
        hidden, centered = after if wide else before, centers_channels(normalization)
        self.residual = nn.Sequential(
            plain_normalization(normalization, before),
            nn.ReLU(),
            glorot(nn.Conv2d(before, hidden, 3, padding=1, bias=not centered), math.sqrt(2.0)),
            plain_normalization(normalization, hidden),
            nn.ReLU(),
            glorot(nn.Conv2d(hidden, after, 3, padding=1), math.sqrt(2.0)),
        )
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.shortcut = glorot(nn.Conv2d(before, after, 1)) if halve or before != after else nn.Identity()

    def forward(self, activations: Tensor) -> Tensor:
        # Means commute with 1x1 convolutions; pooling first takes a quarter of the work.
        out: Tensor = self.pool(self.residual(activations)) + self.shortcut(self.pool(activations))
        return out


class FirstBlock(nn.Module):
    """3x3, ReLU, 3x3, mean over 2x2, plus mean, 1x1. The input is images, so there is no norm or ReLU before."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            glorot(nn.Conv2d(channels, width, 3, padding=1), math.sqrt(2.0)),
            nn.ReLU(),
            glorot(nn.Conv2d(width, width, 3, padding=1), math.sqrt(2.0)),
        )
        self.pool = nn.AvgPool2d(2)
        self.shortcut = glorot(nn.Conv2d(channels, width, 1))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.pool(self.residual(images)) + self.shortcut(self.pool(images))
        return out


class GlobalPooling(nn.Module):
    """`sum` or `mean` over all positions: (n, C, H, W) to (n, C)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, activations: Tensor) -> Tensor:
        return activations.sum((2, 3)) if self.kind == "sum" else activations.mean((2, 3))

    def extra_repr(self) -> str:
        return self.kind


def _enlarge(activations: Tensor) -> Tensor:
    return F.interpolate(activations, scale_factor=2, mode="nearest")


def glorot(layer: Weighted, gain: float = 1.0) -> Weighted:
    """Draw a layer's weights from Glorot's uniform distribution, times a gain; set its bias to 0."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if not isinstance(layer, nn.Embedding) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def plain_normalization(kind: str, channels: int) -> nn.Module:
    """Build an unconditional normalization whose scales start at 1."""
    layer = build_normalization(kind, channels)
    if isinstance(layer, (BatchNorm, VirtualBatchNorm)) and layer.weight is not None:
        nn.init.ones_(layer.weight)
    return layer
