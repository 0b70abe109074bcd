"""Color transforms of ADA (Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix
B)."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Color(NamedTuple):
    """Transforms in the order in which they are applied, (n,) each."""

    brightness: Tensor
    """Added to all channels. Images are in [-1, 1]."""
    contrast: Tensor
    """Factor of all channels."""
    luma_flip: Tensor
    """1 to negate the mean of the channels, else 0."""
    hue: Tensor
    """Rotation about the gray axis, in radians."""
    saturation: Tensor
    """Factor of the distance from the gray axis."""


def adjust_color(images: Tensor, color: Color) -> Tensor:
    """Apply the five transforms to images (n, C, H, W), C 1 or 3.

    All five keep the gray axis and the plane across it apart. With the gray value m, the mean of the channels, and
    the rest r = image - m, they are m -> (m + brightness) contrast (1 - 2 luma_flip) and r -> contrast saturation
    (cos(hue) r + sin(hue) v x r), where v is the unit vector of the gray axis. In one channel r is 0.
    """
    brightness, contrast, luma_flip, hue, saturation = (part.to(images.dtype).view(-1, 1, 1, 1) for part in color)
    gray = images.mean(1, keepdim=True)
    moved = (gray + brightness) * (contrast * (1.0 - 2.0 * luma_flip))
    if images.shape[1] == 1:
        return moved
    rest = images - gray
    across = (rest.roll(1, 1) - rest.roll(-1, 1)) / math.sqrt(3.0)
    strength = contrast * saturation
    colored: Tensor = moved + (strength * hue.cos()) * rest + (strength * hue.sin()) * across
    return colored
