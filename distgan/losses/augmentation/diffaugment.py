"""DiffAugment (Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training", section 3.3, and the
released code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distgan.losses.augmentation import AugmentationDraws

TRANSLATION, CUTOUT = 1 / 8, 1 / 2
"""Largest shift and side of the hole, as fractions of the image's side."""


class DiffAugment:
    """Transforms of images, applied to a sample with the probability, all or none, in the policy's order."""

    def __init__(self, policy: Sequence[str] = ("color", "translation", "cutout")) -> None:
        known = {"color": _color, "translation": _translation, "cutout": cut_out}
        self._transforms = [(name, known[name]) for name in policy]

    def __call__(self, images: Tensor, draws: AugmentationDraws) -> Tensor:
        """Return augmented images (n, C, H, W). Images are in [-1, 1]; the result may exceed that."""
        augmented = images
        for name, transform in self._transforms:
            augmented = transform(augmented, draws.uniform(name, 3).to(images.dtype))
        applied = draws.uniform("applied") < draws.probability
        return torch.where(applied.view(-1, 1, 1, 1), augmented, images)


def _color(images: Tensor, uniforms: Tensor) -> Tensor:
    """Add to the brightness, then scale the distances from each pixel's gray and from the image's mean."""
    brightness, saturation, contrast = (part.view(-1, 1, 1, 1) for part in uniforms.unbind(1))
    images = images + (brightness - 0.5)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (2.0 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _translation(images: Tensor, uniforms: Tensor) -> Tensor:
    """Shift by whole pixels, with zeros where nothing was."""
    for dim, uniform in ((2, uniforms[:, 0]), (3, uniforms[:, 1])):
        images = shifted(images, dim, whole_shifts(uniform, images.shape[dim]))
    return images


def whole_shifts(uniform: Tensor, side: int) -> Tensor:
    """Return shifts by up to an eighth of the side, int64 of the shape of the draws from U[0, 1)."""
    limit = int(side * TRANSLATION + 0.5)
    return (uniform * (2 * limit + 1)).floor().long() - limit


def shifted(images: Tensor, dim: int, shifts: Tensor) -> Tensor:
    """Return images x (n, C, H, W) with x[i + s] at place i of dimension 2 or 3, for shifts s (n,) in whole pixels."""
    side = images.shape[dim]
    source = torch.arange(side, device=images.device) + shifts[:, None]
    inside = _along(dim, (source >= 0) & (source < side))
    places = _along(dim, source.clamp(0, side - 1)).expand_as(images)
    return torch.where(inside, images.gather(dim, places), 0.0)


def cut_out(images: Tensor, uniforms: Tensor) -> Tensor:
    """Set a rectangle to 0 whose center is anywhere in the image, so that parts of it may lie outside."""
    hole = torch.ones((), dtype=torch.bool, device=images.device)
    for dim, uniform in ((2, uniforms[:, 0]), (3, uniforms[:, 1])):
        side = images.shape[dim]
        size = int(side * CUTOUT + 0.5)
        first = (uniform * (side + 1 - size % 2)).floor() - size // 2
        place = torch.arange(side, device=images.device) - first[:, None]
        hole = hole & _along(dim, (place >= 0) & (place < size))
    return images.masked_fill(hole, 0.0)


def _along(dim: int, values: Tensor) -> Tensor:
    """Return values (n, side) as (n, 1, side, 1) or (n, 1, 1, side), for dimension 2 or 3."""
    return values[:, None, :, None] if dim == 2 else values[:, None, None, :]
