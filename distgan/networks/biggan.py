"""Residual networks of BigGAN.

Brock, Donahue, Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019, appendix B,
and the authors' BigGAN-PyTorch, whose networks for 32 pixels (CIFAR-10) and 64 are not in the paper. Both networks have
spectral norm, except on the class embeddings of the generator.

Biases start at 0. Those that batch norm takes away have no effect in the released code and are left out here: in front
of a block's second norm, and all in the generator's blocks after the last attention. Their gradients would be rounding
errors, which Adam makes as large as any.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks import resnet
from distgan.networks.layers.attention import SelfAttention
from distgan.networks.layers.labels import ClassTable
from distgan.networks.layers.normalization import ConditionalNormalization
from distgan.networks.layers.residual import (
    DiscriminatorBlock,
    FirstBlock,
    GeneratorBlock,
    GlobalPooling,
    ProjectionDiscriminator,
    plain_normalization,
)
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.shape import SampleShape

GENERATOR_WIDTHS = {**resnet.GENERATOR_WIDTHS, 32: (4, 4, 4, 4), 64: (16, 16, 8, 4, 2)}
"""Multiples of `width`, ch in the paper, at 4x4 and after each block; each block doubles the size."""

DISCRIMINATOR_WIDTHS = {**resnet.DISCRIMINATOR_WIDTHS, 32: (4, 4, 4, 4)}
"""Multiples of `width` after each block."""

PLAIN_BLOCKS = {**resnet.PLAIN_BLOCKS, 64: 1}
"""Number of last discriminator blocks that keep the size; the others halve it."""

_EPS = 1e-5


class BigGANGenerator(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to images (n, C, R, R) in [-1, 1].

    Each block's norms have scales 1 + gain and offsets per sample. With `shared_size` these are linear functions of one
    class embedding, else each norm has tables of its own. With `hierarchical` the latent is split evenly: the first
    part makes the 4x4 features, and each block's norms look at one of the others beside the embedding.

    Raises:
        UserError: options that do not fit each other or the data.
    """

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        attention: Sequence[int] = (),
        initialization: str = "orthogonal",
        shared_size: int | None = None,
        hierarchical: bool = False,
        normalization: str = "synchronized",
    ) -> None:
        super().__init__()
        widths = resnet.table_widths("biggan generator", GENERATOR_WIDTHS, shape, width)
        self.num_classes = shape.num_classes
        parts = len(widths) if hierarchical else 1
        _check_conditions(shape, latent_size, shared_size, parts)
        self.part = latent_size // parts
        self.shared_embedding = ClassTable(shape.num_classes, shared_size) if shared_size else None
        self.projection = nn.Linear(self.part, widths[0] * 16)
        normalize = functools.partial(
            _normalization, normalization, shape.num_classes, shared_size or 0, self.part if hierarchical else 0
        )
        sides = [8 << number for number in range(len(widths) - 1)]
        self.attentions = nn.ModuleList(_attentions("generator", attention, sides, widths[1:]))
        self.blocks = nn.ModuleList(
            GeneratorBlock(before, after, normalize, inner_bias=False, bias=side <= max(attention, default=0))
            for (before, after), side in zip(pairwise(widths), sides, strict=True)
        )
        self.output = nn.Sequential(
            plain_normalization(normalization, widths[-1]),
            nn.ReLU(),
            nn.Conv2d(widths[-1], shape.channels, 3, padding=1),
            nn.Tanh(),
        )
        _initialize(self, initialization)
        add_spectral_norm(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        first, *others = latents.split(self.part, dim=1)
        conditions = self._conditions(others, labels)
        activations = self.projection(first).view(len(latents), -1, 4, 4)
        for block, attend, condition in zip(self.blocks, self.attentions, conditions, strict=True):
            activations = attend(block(activations, *condition))
        images: Tensor = self.output(activations)
        return images

    def _conditions(self, latents: Sequence[Tensor], labels: Tensor | None) -> list[tuple[Tensor, ...]]:
        """Return the condition of each block's norms, an empty tuple if they have none."""
        condition = []
        if self.num_classes:
            assert labels is not None
            condition = [labels if self.shared_embedding is None else self.shared_embedding(labels)]
        if latents:
            return [(torch.cat((*condition, latent), dim=1),) for latent in latents]
        return [tuple(condition)] * len(self.blocks)


class BigGANDiscriminator(ProjectionDiscriminator):
    """Images (n, C, R, R), and int64 labels (n,) if there are classes, to logits (n,).

    Raises:
        UserError: options that do not fit the data.
    """

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        attention: Sequence[int] = (),
        initialization: str = "orthogonal",
    ) -> None:
        widths = resnet.table_widths("biggan discriminator", DISCRIMINATOR_WIDTHS, shape, width)
        halving = len(widths) - PLAIN_BLOCKS[shape.resolution]
        blocks = [FirstBlock(shape.channels, widths[0])] + [
            DiscriminatorBlock(before, after, "none", halve=number < halving, wide=True)
            for number, (before, after) in enumerate(pairwise(widths), start=1)
        ]
        sides = [shape.resolution >> min(number, halving) for number in range(1, len(widths) + 1)]
        attentions = _attentions("discriminator", attention, sides, widths)
        layers = [layer for pair in zip(blocks, attentions, strict=True) for layer in pair]
        features = nn.Sequential(*layers, nn.ReLU(), GlobalPooling("sum"))
        super().__init__(features, widths[-1], shape.num_classes, bias=True)
        _initialize(self, initialization)
        add_spectral_norm(self)


def _check_conditions(shape: SampleShape, latent_size: int, shared_size: int | None, parts: int) -> None:
    if latent_size % parts:
        raise UserError(
            f"generator.latent_size = {latent_size}: with generator.hierarchical it is split into {parts} parts at "
            f"data.resolution = {shape.resolution}; choose a multiple of {parts}"
        )
    if shared_size and not shape.num_classes:
        raise UserError(
            f"generator.shared_size = {shared_size}: has no effect without classes; set data.labels=true, or leave it "
            "out"
        )
    if parts > 1 and shape.num_classes and not shared_size:
        raise UserError(
            "generator.hierarchical: with classes, the norms need one embedding of them beside the latents; set "
            "generator.shared_size=128"
        )


def _normalization(kind: str, num_classes: int, embedding: int, latents: int, channels: int) -> nn.Module:
    """Build a norm with linear functions of a class embedding and latents, with tables, or with neither."""
    if embedding or latents:
        gain, offset = (nn.Linear(embedding + latents, channels, bias=False) for _ in range(2))
        return ConditionalNormalization(kind, channels, gain, offset, eps=_EPS)
    if num_classes:
        tables = (ClassTable(num_classes, channels) for _ in range(2))
        return ConditionalNormalization(kind, channels, *tables, eps=_EPS)
    return plain_normalization(kind, channels)


def _attentions(role: str, wanted: Sequence[int], sides: Sequence[int], widths: Sequence[int]) -> list[nn.Module]:
    """Return a layer per block: attention after the first block of each size in `wanted`, else the identity."""
    for side in wanted:
        if side not in sides:
            known = ", ".join(map(str, dict.fromkeys(sides)))
            raise UserError(
                f"{role}.attention: {side}: the blocks of this {role} end at {known} pixels; choose from these"
            )
        channels = widths[sides.index(side)]
        if channels < 8:
            raise UserError(
                f"{role}.attention: {side}: attention needs 8 channels or more, found {channels} at {side} pixels; "
                f"raise {role}.width"
            )
    placed = {sides.index(side) for side in wanted}
    return [SelfAttention(width) if number in placed else nn.Identity() for number, width in enumerate(widths)]


def _initialize(network: nn.Module, kind: str) -> None:
    """Draw all weights anew: orthogonal matrices (outputs, everything else), or N(0, 0.02). Set biases to 0."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding, ClassTable)):
            if kind == "orthogonal":
                nn.init.orthogonal_(layer.weight)
            else:
                nn.init.normal_(layer.weight, 0.0, 0.02)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
