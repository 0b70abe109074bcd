"""Alignment of the discriminator with DINOv2, as its objective computes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan.config import AlignmentConfig
from distgan.errors import UserError
from distgan.losses.alignment import alignment
from distgan.packages import missing_package
from distgan.players.augmentation import InputAugmentation
from distgan.players.samples import MicroBatch
from distgan.published_weights import Wording

if TYPE_CHECKING:
    from distgan.losses.dinov2 import Teacher

LAYER = "projector"
"""Layer of the discriminator whose outputs are aligned."""
_KEY = "objective.alignment"
_WORDING = Wording(_KEY, f"{_KEY}.weights", "no cache", f"set {_KEY}=null")


class Alignment:
    """The term `objective.alignment`.

    Raises:
        UserError: a package or the weights are missing, or the augmentation does not say how it moves images.
    """

    def __init__(self, config: AlignmentConfig, augmentation: InputAugmentation | None) -> None:
        if augmentation is not None and not augmentation.is_followed:
            raise UserError(
                f"{_KEY}: {augmentation.name} has no method follow(images, draws, size), so that images would not be "
                f"moved as the samples that they belong to; set {_KEY}=null, or leave the augmentation out"
            )
        assert config.weights is not None
        self.weight = config.weight
        self.teacher = load_teacher(config.weights)

    def inputs(self, batch: MicroBatch) -> Tensor:
        """Return the images of the reals as the teacher takes them, float32 (n, 3, 224, 224)."""
        assert batch.reals is not None
        if batch.images is not None:
            return self.teacher.inputs(batch.images.values)
        levels = ((batch.reals.float() + 1.0) * 127.5).round().clamp(0, 255)
        return self.teacher.inputs(levels.to(torch.uint8))

    def loss(self, projected: Tensor, tokens: Tensor, batch: MicroBatch) -> Tensor:
        """Return the unweighted term, shape (), for the outputs of the layer and the teacher's tokens."""
        return alignment(projected, tokens, None if batch.images is None else batch.images.known)


def load_teacher(weights: str) -> Teacher:
    """Load DINOv2 ViT-B/14 from a path. Raises UserError if it, or the package transformers, is missing or damaged."""
    try:
        from distgan.losses.dinov2 import BASE, Teacher
    except ImportError:
        raise missing_package(_WORDING.user, "transformers", _WORDING.instead) from None
    read = BASE.read(weights, Path(), _WORDING)
    try:
        return Teacher(read)
    except UserError as error:
        raise UserError(f"{_WORDING.weights} = {weights}: {error}") from None
