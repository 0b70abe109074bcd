"""Residual networks of WGAN-GP and SNGAN.

Gulrajani et al., "Improved Training of Wasserstein GANs", NIPS 2017, for 32 pixels; Miyato et al., "Spectral
Normalization for GANs", ICLR 2018, and Miyato and Koyama, "cGANs with Projection Discriminator", ICLR 2018, for these
and more. At 32 pixels all layers are equally wide: 128 in WGAN-GP, 256 (generator) and 128 (discriminator) in SNGAN.
From 64 pixels on, `width` is SNGAN's ch (64 in the paper), multiplied by the tables below. A `max_width` of 512 gives
WGAN-GP's generator for 64 pixels.

Convolutions before batch norm have no bias here; in the released codes it has no effect.
"""

from __future__ import annotations

import functools
from itertools import pairwise

from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.layers.normalization import build_normalization, centers_channels
from distgan.networks.layers.residual import (
    DiscriminatorBlock,
    FirstBlock,
    GeneratorBlock,
    GlobalPooling,
    ProjectionDiscriminator,
    glorot,
    plain_normalization,
)
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.layers.virtual_batch_norm import add_reference
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
        max_width: int | None = None,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = table_widths("resnet generator", GENERATOR_WIDTHS, shape, width, max_width)
        self.conditional = shape.num_classes > 0
        self.projection = glorot(nn.Linear(latent_size, widths[0] * 16))
        normalize = functools.partial(plain_normalization, normalization)
        if self.conditional:
            normalize = functools.partial(build_normalization, normalization, num_classes=shape.num_classes)
        bias = not centers_channels(normalization)
        self.blocks = nn.ModuleList(
            GeneratorBlock(before, after, normalize, inner_bias=bias, bias=bias) for before, after in pairwise(widths)
        )
        self.output = nn.Sequential(
            plain_normalization(normalization, widths[-1]),
            nn.ReLU(),
            glorot(nn.Conv2d(widths[-1], shape.channels, 3, padding=1)),
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


class ResNetDiscriminator(ProjectionDiscriminator):
    """Images (n, C, R, R), and int64 labels (n,) if there are classes, to logits (n,)."""

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        max_width: int | None = None,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
        pooling: str = "sum",
    ) -> None:
        widths = table_widths("resnet discriminator", DISCRIMINATOR_WIDTHS, shape, width, max_width)
        halving = len(widths) - PLAIN_BLOCKS[shape.resolution]
        blocks = [FirstBlock(shape.channels, widths[0])] + [
            DiscriminatorBlock(before, after, normalization, halve=number < halving)
            for number, (before, after) in enumerate(pairwise(widths), start=1)
        ]
        # SNGAN's logit has a bias except at 32 pixels.
        bias = shape.resolution > 32 or not spectral_norm
        features = nn.Sequential(*blocks, nn.ReLU(), GlobalPooling(pooling))
        super().__init__(features, widths[-1], shape.num_classes, bias=bias)
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, shape.sizes, labeled=shape.num_classes > 0)


def table_widths(
    network: str, table: dict[int, tuple[int, ...]], shape: SampleShape, width: int, max_width: int | None = None
) -> list[int]:
    """Return the channels of each stage of a network: the table's multiples of `width`, at most `max_width`.

    Raises:
        UserError: the table has no row for the resolution.
    """
    if shape.resolution not in table:
        raise UserError(
            f"data.resolution = {shape.resolution}: the {network} supports {', '.join(map(str, table))}; "
            "set one of these; images are resized to it"
        )
    widths = [width * multiple for multiple in table[shape.resolution]]
    return widths if max_width is None else [min(channels, max_width) for channels in widths]
