"""Laplacian pyramid of images.

Burt and Adelson, "The Laplacian Pyramid as a Compact Image Code", 1983, with the binomial filter (1, 4, 6, 4, 1) / 16
in each direction and borders mirrored without repeating the edge.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SMALLEST = 16


def level_sizes(resolution: int) -> list[int]:
    """Return the sizes of the levels: the resolution and its halves, while they are whole and at least 16."""
    sizes = [resolution]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= SMALLEST:
        sizes.append(sizes[-1] // 2)
    return sizes


def laplacian_pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Return the levels of images, from fine to coarse.

    A level is an image minus its half, enlarged again. The last level is the smallest image. The filter's weights are
    dyadic, so levels of uint8 images are exact while they fit float64: the order of sums does not change them.

    Args:
        images: shape (n, C, R, R), any real dtype.
        levels: at least 1; R is divisible by 2^(levels - 1).

    Returns:
        float64, shapes (n, C, R / 2^l, R / 2^l).
    """
    pyramid = [images.double()]
    for _ in range(levels - 1):
        half = _smooth(pyramid[-1])[:, :, ::2, ::2]
        pyramid[-1] = pyramid[-1] - enlarged(half)
        pyramid.append(half)
    return pyramid


def enlarged(images: Tensor) -> Tensor:
    """Return images (n, C, R, R) at twice the resolution, smoothed."""
    zeros = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    zeros[:, :, ::2, ::2] = images
    return 4 * _smooth(zeros)


def _smooth(images: Tensor) -> Tensor:
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    return _filtered(_filtered(padded).mT).mT


def _filtered(images: Tensor) -> Tensor:
    """Filter along the last dimension, which becomes 4 shorter."""
    count = images.shape[-1] - 4
    a, b, c, d, e = (images[..., start : start + count] for start in range(5))
    return (a + e + 4 * (b + d) + 6 * c) / 16
