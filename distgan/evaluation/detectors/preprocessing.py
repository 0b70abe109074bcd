"""Images as published networks take them: RGB, at the network's resolution, normalized."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from distgan.errors import UserError

_PRECISION = 22
"""Bits after the point of Pillow's weights for 8-bit images."""


def rgb(images: Tensor) -> Tensor:
    """Repeat the channel of grayscale images: (n, 1 or 3, H, W) to (n, 3, H, W).

    Raises:
        UserError: there is another number of channels.
    """
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] != 3:
        raise UserError(f"images: found {images.shape[1]} channels, expected 1 or 3; convert the images to RGB")
    return images


def normalized(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Scale uint8 RGB images (n, 3, H, W) to [0, 1], subtract the mean of each channel and divide by its deviation."""
    scaled = images.float() / 255
    return (scaled - scaled.new_tensor(mean).view(3, 1, 1)) / scaled.new_tensor(deviation).view(3, 1, 1)


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 images (n, C, H, W) by Pillow's bicubic filter, which is antialiased.

    Rows are resized and rounded to bytes, then columns, with weights of 22 bits after the point. Float64 holds these
    sums exactly, so they do not depend on the device or on the order of summation. Square images get the same bytes as
    from Pillow. For others Pillow may take columns first, depending on its version.
    """
    for dimension, size in ((-1, width), (-2, height)):
        if images.shape[dimension] != size:
            weights = _weights(images.shape[dimension], size).to(images.device)
            rows = images.transpose(dimension, -1).double() @ weights.T
            rounded = ((rows + 2 ** (_PRECISION - 1)) / 2**_PRECISION).floor().clamp(0, 255)
            images = rounded.to(torch.uint8).transpose(dimension, -1)
    return images


@cache
def _weights(size: int, wanted: int) -> Tensor:
    """Return Pillow's weights, shape (wanted, size), float64 integers: those of row i sum up to about 2**22.

    An output pixel is a mean over the input pixels within two pixels of its center, or, if the image shrinks, within
    two pixels of the output.
    """
    scale = size / wanted
    stretch = max(scale, 1.0)
    weights = torch.zeros(wanted, size, dtype=torch.float64)
    for i in range(wanted):
        center = (i + 0.5) * scale
        first, last = max(int(center - 2 * stretch + 0.5), 0), min(int(center + 2 * stretch + 0.5), size)
        row = [_cubic((place - center + 0.5) / stretch) for place in range(first, last)]
        total = sum(row)
        for place, weight in zip(range(first, last), row, strict=True):
            scaled = weight / total * 2**_PRECISION
            weights[i, place] = int(scaled + math.copysign(0.5, scaled))
    return weights


def _cubic(x: float) -> float:
    """Cubic convolution with a = -1/2 (Keys 1981)."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0
