"""DiffAugment of latents, as GAT has it (Hyun et al. 2026, "Scalable GANs with Transformers"; released code,
losses/diffaug.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distgan.losses.augmentation import AugmentationDraws
from distgan.losses.augmentation.diffaugment import cut_out, shifted, whole_shifts

COLOR, FLIP = 0.5, 0.4
"""Share of the samples whose channels are changed, and of those that are flipped."""


class LatentDiffAugment:
    """Transforms of latents, applied to a sample with the probability, all or none, in the policy's order.

    `color` and `flip` change only their shares of these samples. `color` differs from that of images: its means are of
    the sample before augmentation. With levels they are of the last one, and at the ends of finite differences of the
    sample in the middle, so that all levels and ends of a sample are mapped alike.
    """

    def __init__(self, policy: Sequence[str] = ("color", "translation", "cutout", "flip")) -> None:
        self._policy = tuple(policy)

    def __call__(self, samples: Tensor, draws: AugmentationDraws) -> Tensor:
        """Return augmented latents (n, C, H, W)."""
        reference = samples if draws.reference is None else draws.reference
        augmented = samples
        for name in self._policy:
            uniforms = draws.uniform(name, 4).to(samples.dtype)
            if name == "color":
                augmented = _color(augmented, reference, uniforms)
            elif name == "translation":
                augmented = _translation(augmented, uniforms, samples.shape[2:])
            elif name == "cutout":
                augmented = cut_out(augmented, uniforms)
            else:
                augmented = _flip(augmented, uniforms)
        return self._where_applied(draws, augmented, samples)

    def follow(self, images: Tensor, draws: AugmentationDraws, size: torch.Size) -> Tensor:
        """Move and flip images (n, C, H, W) as the latents that they belong to. Their size is `size`, (h, w).

        A shift by one place of a latent is one by H/h pixels. (In the released code it is by h/H, rounded down: by 0 or
        -1 pixels.)
        """
        moved = images
        for name in self._policy:
            uniforms = draws.uniform(name, 4).to(images.dtype)
            if name == "translation":
                moved = _translation(moved, uniforms, size)
            elif name == "flip":
                moved = _flip(moved, uniforms)
        return self._where_applied(draws, moved, images)

    @staticmethod
    def _where_applied(draws: AugmentationDraws, augmented: Tensor, samples: Tensor) -> Tensor:
        applied = draws.uniform("applied") < draws.probability
        return torch.where(applied.view(-1, 1, 1, 1), augmented, samples)


def _color(samples: Tensor, reference: Tensor, uniforms: Tensor) -> Tensor:
    """Add to all channels, then scale the distances from a mean over channels and from a mean of the sample."""
    brightness, saturation, contrast, chance = (part.view(-1, 1, 1, 1) for part in uniforms.unbind(1))
    gray, mean = reference.mean(1, keepdim=True), reference.mean((1, 2, 3), keepdim=True)
    changed = samples + (brightness - 0.5)
    changed = gray + (changed - gray) * (2.0 * saturation)
    changed = mean + (changed - mean) * (contrast + 0.5)
    return torch.where(chance < COLOR, changed, samples)


def _translation(images: Tensor, uniforms: Tensor, size: torch.Size) -> Tensor:
    """Shift by whole places of a latent of this size, with zeros where nothing was."""
    for dim, side, uniform in zip((2, 3), size, uniforms[:, :2].unbind(1), strict=True):
        shift = whole_shifts(uniform, side) * images.shape[dim] / side
        images = shifted(images, dim, shift.round().long())
    return images


def _flip(images: Tensor, uniforms: Tensor) -> Tensor:
    """Reverse the columns."""
    return torch.where((uniforms[:, 0] < FLIP).view(-1, 1, 1, 1), images.flip(3), images)
