"""Residual networks of WGAN-GP and SNGAN.

Gulrajani et al., "Improved Training of Wasserstein GANs", NIPS 2017, for 32 pixels; Miyato et al., "Spectral
Normalization for GANs", ICLR 2018, and Miyato and Koyama, "cGANs with Projection Discriminator", ICLR 2018, for these
and more. At 32 pixels all layers are equally wide: 128 in WGAN-GP, 256 (generator) and 128 (discriminator) in SNGAN.
From 64 pixels on, `width` is SNGAN's ch (64 in the paper), multiplied by the tables below. A `max_width` of 512 gives
WGAN-GP's generator for 64 pixels.

Both released codes draw weights from Glorot's uniform distribution, times sqrt(2) for the 3x3 convolutions of blocks,
and set biases to 0. Convolutions before batch norm have no bias here; in the released codes it has no effect.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.layers.normalization import BatchNorm, build_normalization, centers_channels
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.layers.virtual_batch_norm import VirtualBatchNorm, add_reference
from distgan.networks.shape import SampleShape

GENERATOR_WIDTHS = {
    32: (1, 1, 1, 1),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
"""Multiples of `width` at 4x4 and after each block; each block doubles the size."""

DISCRIMINATOR_WIDTHS = {
    32: (1, 1, 1, 1),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}
"""Multiples of `width` after each block."""

PLAIN_BLOCKS = {32: 2, 64: 0, 128: 1, 256: 1}
"""Number of last discriminator blocks that keep the size; the others halve it."""

Weighted = TypeVar("Weighted", nn.Conv2d, nn.Linear, nn.Embedding)


class ResNetGenerator(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to images (n, C, R, R) in [-1, 1].

    Labels choose the scales and offsets of the blocks' normalizations.
    """

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        max_width: int = 1024,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths("generator", GENERATOR_WIDTHS, shape, width, max_width)
        self.conditional = shape.num_classes > 0
        self.projection = _glorot(nn.Linear(latent_size, widths[0] * 16))
        self.blocks = nn.ModuleList(
            GeneratorBlock(before, after, normalization, shape.num_classes) for before, after in pairwise(widths)
        )
        self.output = nn.Sequential(
            _normalization(normalization, widths[-1]),
            nn.ReLU(),
            _glorot(nn.Conv2d(widths[-1], shape.channels, 3, padding=1)),
            nn.Tanh(),
        )
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, (latent_size,), labeled=self.conditional)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        condition: tuple[Tensor, ...] = ()
        if self.conditional:
            assert labels is not None
            condition = (labels,)
        activations = self.projection(latents).unflatten(1, (-1, 4, 4))
        for block in self.blocks:
            activations = block(activations, *condition)
        images: Tensor = self.output(activations)
        return images


class GeneratorBlock(nn.Module):
    """Norm, ReLU, enlarge, 3x3, norm, ReLU, 3x3, plus enlarge, 1x1: (n, before, r, r) to (n, after, 2r, 2r)."""

    def __init__(self, before: int, after: int, normalization: str, num_classes: int) -> None:
        super().__init__()
        bias = not centers_channels(normalization)
        self.first_norm = _normalization(normalization, before, num_classes)
        self.first = _glorot(nn.Conv2d(before, after, 3, padding=1, bias=bias), math.sqrt(2.0))
        self.second_norm = _normalization(normalization, after, num_classes)
        self.second = _glorot(nn.Conv2d(after, after, 3, padding=1, bias=bias), math.sqrt(2.0))
        self.shortcut = _glorot(nn.Conv2d(before, after, 1, bias=bias))

    def forward(self, activations: Tensor, *labels: Tensor) -> Tensor:
        residual = self.first(_enlarge(F.relu(self.first_norm(activations, *labels))))
        residual = self.second(F.relu(self.second_norm(residual, *labels)))
        # A 1x1 convolution commutes with enlarging; doing it first takes a quarter of the work.
        out: Tensor = residual + _enlarge(self.shortcut(activations))
        return out


class ResNetDiscriminator(nn.Module):
    """Images (n, C, R, R), and int64 labels (n,) if there are classes, to logits (n,).

    Labels enter by projection: the logit is a linear function of the features plus their product with the class
    embedding (Miyato and Koyama 2018).
    """

    feature_layer = "features"

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        max_width: int = 1024,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
        pooling: str = "sum",
    ) -> None:
        super().__init__()
        widths = _widths("discriminator", DISCRIMINATOR_WIDTHS, shape, width, max_width)
        halving = len(widths) - PLAIN_BLOCKS[shape.resolution]
        blocks = [FirstBlock(shape.channels, widths[0])] + [
            DiscriminatorBlock(before, after, normalization, halve=number < halving)
            for number, (before, after) in enumerate(pairwise(widths), start=1)
        ]
        self.features = nn.Sequential(*blocks, nn.ReLU(), GlobalPooling(pooling))
        # SNGAN's logit has a bias except at 32 pixels.
        bias = shape.resolution > 32 or not spectral_norm
        self.logit = _glorot(nn.Linear(widths[-1], 1, bias=bias))
        self.embedding = _glorot(nn.Embedding(shape.num_classes, widths[-1])) if shape.num_classes else None
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, shape.sizes, labeled=shape.num_classes > 0)

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

    def __init__(self, before: int, after: int, normalization: str, *, halve: bool) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _normalization(normalization, before),
            nn.ReLU(),
            _glorot(nn.Conv2d(before, before, 3, padding=1, bias=not centers_channels(normalization)), math.sqrt(2.0)),
            _normalization(normalization, before),
            nn.ReLU(),
            _glorot(nn.Conv2d(before, after, 3, padding=1), math.sqrt(2.0)),
        )
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.shortcut = _glorot(nn.Conv2d(before, after, 1)) if halve or before != after else nn.Identity()

    def forward(self, activations: Tensor) -> Tensor:
        # Means commute with 1x1 convolutions; pooling first takes a quarter of the work.
        out: Tensor = self.pool(self.residual(activations)) + self.shortcut(self.pool(activations))
        return out


class FirstBlock(nn.Module):
    """3x3, ReLU, 3x3, mean over 2x2, plus mean, 1x1. The input is images, so there is no norm or ReLU before."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _glorot(nn.Conv2d(channels, width, 3, padding=1), math.sqrt(2.0)),
            nn.ReLU(),
            _glorot(nn.Conv2d(width, width, 3, padding=1), math.sqrt(2.0)),
        )
        self.pool = nn.AvgPool2d(2)
        self.shortcut = _glorot(nn.Conv2d(channels, width, 1))

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


def _glorot(layer: Weighted, gain: float = 1.0) -> Weighted:
    nn.init.xavier_uniform_(layer.weight, gain)
    if not isinstance(layer, nn.Embedding) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _normalization(kind: str, channels: int, num_classes: int = 0) -> nn.Module:
    layer = build_normalization(kind, channels, num_classes=num_classes)
    if isinstance(layer, (BatchNorm, VirtualBatchNorm)) and layer.weight is not None:
        nn.init.ones_(layer.weight)
    return layer


def _widths(role: str, table: dict[int, tuple[int, ...]], shape: SampleShape, width: int, max_width: int) -> list[int]:
    if shape.resolution not in table:
        raise UserError(
            f"data.resolution = {shape.resolution}: the resnet {role} supports {', '.join(map(str, table))}; "
            "set one of these; images are resized to it"
        )
    return [min(width * multiple, max_width) for multiple in table[shape.resolution]]
