"""Samples on their way through an objective: a micro-batch, and what of it goes through the discriminator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distgan.config import Config, ZeroCenteredPenaltyConfig
from distgan.config.objective.alignment import IMAGE_SIDE
from distgan.networks.shape import SampleShape


class RealImages(NamedTuple):
    """Images that latents are encoded from."""

    values: Tensor
    """uint8 (n, 3, H, H)"""
    known: Tensor
    """(n,) bool: False where the image could not be read, and another one stands in for it."""


class MicroBatch(NamedTuple):
    """One rank's part of a micro-batch. Samples are network inputs: floats of shape (n, *sizes)."""

    addresses: Tensor
    """(n,) int64: address of each sample's random draws, equal for any number of ranks."""
    latents: Tensor
    """(n, latent_size)"""
    labels: Tensor | None
    """(n,) int64: classes of the fakes where the objective has no reals; None if unconditional."""
    reals: Tensor | None
    """(n, *sizes); None where the objective needs no reals."""
    real_labels: Tensor | None
    """(n,) int64: classes of the reals; None if unconditional."""
    images: RealImages | None = None
    """Images of the reals, if these are latents and the objective looks at images."""


def blank_batch(share: int, config: Config, shape: SampleShape, device: torch.device) -> MicroBatch:
    """Return zeros in the shape of one rank's part of a micro-batch."""
    numbers = torch.zeros(share, dtype=torch.int64, device=device)
    labels = numbers if shape.num_classes else None
    latents = torch.zeros(share, config.generator.latent_size, device=device)
    images = None
    if config.reads_images:
        pixels = torch.zeros(share, 3, IMAGE_SIDE, IMAGE_SIDE, dtype=torch.uint8, device=device)
        images = RealImages(pixels, torch.ones(share, dtype=torch.bool, device=device))
    return MicroBatch(numbers, latents, labels, torch.zeros(share, *shape.sizes, device=device), labels, images)


class Side(NamedTuple):
    """Reals or fakes in the discriminator's loss."""

    kind: str
    """`real` or `fake`."""
    samples: Tensor
    labels: Tensor | None
    penalty: ZeroCenteredPenaltyConfig | None
    """Their zero-centered penalty, if it is due."""

    @property
    def is_exact(self) -> bool:
        """Whether the penalty is due and needs a second derivative."""
        return self.penalty is not None and self.penalty.method == "exact"


class Inputs(NamedTuple):
    """Samples on their way into the discriminator."""

    samples: Tensor
    """(n, *sizes): points at which gradient penalties are taken, before or after augmentation."""
    augmented: Tensor
    """(n, *sizes)"""
    labels: Tensor | None
    """(n,) int64; None if unconditional."""


class Pass(NamedTuple):
    """Arguments of `Objective._discriminate`."""

    augmented: Tensor
    labels: Tensor | None
    penalized: bool
    differentiable: bool


class Judged(NamedTuple):
    """Samples with what the discriminator makes of them, augmented."""

    samples: Tensor
    """(n, *sizes): points at which gradient penalties are taken, before or after augmentation."""
    logits: Tensor
    """(n,), at least float32."""
    features: dict[str, Tensor]
    """Outputs of the layers that the objective looks at, at least float32."""
    ends: tuple[Tensor, ...] = ()
    """Logits (m,) at the ends of finite differences."""
