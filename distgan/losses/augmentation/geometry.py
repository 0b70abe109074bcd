"""Geometric transforms of ADA as one affine map (Karras et al. 2020, "Training Generative Adversarial Networks with
Limited Data", appendix B)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Transforms in the order in which they are applied, (n,) each: flip left-right, turn by quarters, shift by whole
    pixels, scale, rotate, stretch, rotate, shift."""

    flip: Tensor
    """1 to flip left-right, else 0."""
    turns: Tensor
    """Quarter turns: 0, 1, 2 or 3."""
    whole_x: Tensor
    """Shift to the right in whole pixels."""
    whole_y: Tensor
    """Shift downward in whole pixels."""
    scale: Tensor
    """Factor of both sides; above 1 enlarges."""
    first_angle: Tensor
    """Rotation before the stretch, in radians."""
    stretch: Tensor
    """Factor of the width, and divisor of the height."""
    second_angle: Tensor
    """Rotation after the stretch, in radians."""
    x: Tensor
    """Shift to the right in pixels."""
    y: Tensor
    """Shift downward in pixels."""


def inverse_map(geometry: Geometry) -> Tensor:
    """Return the map from positions in the result to positions in the image, (n, 2, 3) float64; see `resample`.

    Float64 keeps TF32 away from the products of matrices, and positions exact in large images.
    """
    flip, turns, whole_x, whole_y, scale, first, stretch, second, x, y = (part.double() for part in geometry)
    # Cosine and sine of whole quarter turns, without rounding.
    turned = _matrix((turns - 2).abs() - 1, (turns - 1).abs() - 1, 1 - (turns - 1).abs(), (turns - 2).abs() - 1)
    pixels = _diagonal(1 - 2 * flip, torch.ones_like(flip)) @ turned
    filtered = _diagonal(1 / scale, 1 / scale) @ _rotation(first) @ _diagonal(1 / stretch, stretch) @ _rotation(second)
    shifts = torch.stack((x, y), -1)[:, :, None], torch.stack((whole_x, whole_y), -1)[:, :, None]
    return torch.cat((pixels @ filtered, -pixels @ (filtered @ shifts[0] + shifts[1])), dim=2)


def _rotation(angle: Tensor) -> Tensor:
    return _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _diagonal(first: Tensor, second: Tensor) -> Tensor:
    zero = torch.zeros_like(first)
    return _matrix(first, zero, zero, second)


def _matrix(*elements: Tensor) -> Tensor:
    return torch.stack(elements, dim=-1).view(-1, 2, 2)
