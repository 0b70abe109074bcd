"""Augmentation of the discriminator's inputs."""

from __future__ import annotations

from torch import Tensor

from distgan.losses.augmentation import AugmentationDraws


class Fade:
    """Blend images with gray, by a share of their own each."""

    kinds = ("images",)

    def __init__(self, strength: float = 0.5) -> None:
        self.strength = strength

    def __call__(self, samples: Tensor, draws: AugmentationDraws) -> Tensor:
        applied = draws.uniform("applied") < draws.probability
        share = self.strength * draws.uniform("share") * applied
        return samples * (1 - share[:, None, None, None])
