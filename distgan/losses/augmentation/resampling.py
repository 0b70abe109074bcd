"""Affine resampling of images with an orthogonal low-pass filter (Karras et al. 2020, "Training Generative Adversarial
Networks with Limited Data", appendix B).

An image is continued by reflection at its outermost pixels, doubled in resolution by the filter, sampled bilinearly at
the transformed positions, and halved again by the mirrored filter. The filter's even shifts are orthonormal, so that
doubling and halving alone give the image back, and shifts by whole pixels are exact.

Doubling and halving are products with fixed matrices, of which both axes of an image have one. The doubled image covers
one period of the continued one, so that positions are taken modulo the period: no padding depends on the transforms.
The released code pads by what the batch's farthest transform needs, at most the size less one pixel, and has zeros
beyond; up to there both are equal.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""Low-pass filter of the symlet with six vanishing moments (Daubechies 1992, section 8.1.1), of unit norm."""

_TAPS = len(SYM6)
_CENTER = 5
"""Place of pixel 0 in the doubled image: the mean of the taps' places, 5.1, rounded. Pixel x is at 2 x + 5."""


def resample(images: Tensor, inverse: Tensor) -> Tensor:
    """Transform images (n, C, H, W).

    Args:
        inverse: (n, 2, 3), from a position in the result to the position in the image that it shows. Positions are
            (x, y, 1) in pixels from the center, with y downward.

    Returns:
        Images of the same shape and dtype, differentiable in `images`.
    """
    height, width = images.shape[-2:]
    doubled = _doubling(height, images.dtype, images.device) @ images @ _doubling(width, images.dtype, images.device).mT
    x, y = _positions(inverse.to(images.dtype), height, width)
    halving_rows, halving_columns = (_halving(side, images.dtype, images.device) for side in (height, width))
    return halving_rows @ _sample(doubled, x, y) @ halving_columns.mT


def _positions(inverse: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return where to sample the doubled image: x and y, each (n, 2 H + 10, 2 W + 10), within one period."""
    sides = []
    for length in (width, height):
        steps = torch.arange(2 * length + _TAPS - 2, dtype=inverse.dtype, device=inverse.device)
        sides.append(steps - (length - 1 + _CENTER))  # doubled pixels from the center
    x, y = sides[0][None, None, :], sides[1][None, :, None]
    # Not a matrix product, whose sums may be of another order in a batch of another size.
    rows = inverse[:, :, :, None, None].unbind(1)
    positions = (row[:, 0] * x + row[:, 1] * y + 2.0 * row[:, 2] for row in rows)
    u, v = (
        torch.remainder(position + (length - 1 + _CENTER), 2 * _period(length))
        for position, length in zip(positions, (width, height), strict=True)
    )
    return u, v


def _sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return images (n, C, h, w) at the positions x and y (n, H, W) between their pixels, linear in each direction."""
    height, width = images.shape[-2:]
    if images.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _sample_by_index(images, x, y)  # grid_sample has no deterministic backward on CUDA
    # Dyadic numbers stay exact for sizes that are a power of two, so that pixels do not blur.
    grid = torch.stack(((2.0 * x + 1.0) / width - 1.0, (2.0 * y + 1.0) / height - 1.0), dim=-1)
    sampled: Tensor = _GridSample.apply(images, grid)
    return sampled


_BILINEAR, _BORDER = 0, 1
"""Modes of torch's operator. A position is outside the image only by rounding."""


class _GridSample(torch.autograd.Function):
    """`grid_sample`, which is linear in the images, with derivatives of every order in them.

    torch 2.10 and 2.11 lack the second derivative. This also needs less memory: it does not keep the images.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = images.shape[-2:]
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _GridSampleAdjoint.apply(gradient, *ctx.saved_tensors, ctx.size), None


class _GridSampleAdjoint(torch.autograd.Function):
    """The gradient of `grid_sample` in the images, which is linear too: its own gradient is `grid_sample`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, size: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        shape_only = gradient.new_empty(*gradient.shape[:2], *size)
        adjoint: Tensor = torch.ops.aten.grid_sampler_2d_backward(
            gradient, shape_only, grid, _BILINEAR, _BORDER, False, [True, False]
        )[0]
        return adjoint

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _GridSample.apply(gradient, *ctx.saved_tensors), None, None


def _sample_by_index(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    count, channels, _, width = images.shape
    left, top = x.floor(), y.floor()
    places = (top * width + left).long().view(count, 1, -1).expand(-1, channels, -1)
    pixels = images.flatten(2)

    def at(offset: int) -> Tensor:
        return pixels.gather(2, places + offset).view(count, channels, *x.shape[1:])

    across, down = (x - left)[:, None], (y - top)[:, None]
    return torch.lerp(torch.lerp(at(0), at(1), across), torch.lerp(at(width), at(width + 1), across), down)


def reflect(position: int, length: int) -> int:
    """Return the pixel of 0 to length - 1 that continuation by reflection shows at a position."""
    folded = position % _period(length)
    return min(folded, _period(length) - folded)


def _period(length: int) -> int:
    return max(1, 2 * (length - 1))


@cache
def _doubling(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (4 length, length) from pixels to a period of the doubled line, and a few more places."""
    matrix = np.zeros((4 * length, length))
    for place in range(4 * length):
        for tap in range(place % 2, _TAPS, 2):
            matrix[place, reflect((place - tap) // 2, length)] += 2.0**0.5 * SYM6[tap]
    return torch.from_numpy(matrix).to(device, dtype)


@cache
def _halving(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (length, 2 length + 10) from a doubled line to pixels."""
    matrix = np.zeros((length, 2 * length + _TAPS - 2))
    for place in range(length):
        matrix[place, 2 * place : 2 * place + _TAPS] = np.array(SYM6) / 2.0**0.5
    return torch.from_numpy(matrix).to(device, dtype)
