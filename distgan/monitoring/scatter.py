"""Scatter plot of points in the plane."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIDE = 512
"""Width and height in pixels."""
_AXES, _INK = (205, 205, 205), (20, 60, 140)
_OPACITY = 0.5


def scatter(points: Tensor) -> Tensor:
    """Draw points as dots of 3x3 pixels, darker where several overlap, on axes labeled with their limits.

    Both axes run from -m to m, where m is 1, 2 or 5 times a power of ten.

    Args:
        points: float, shape (n, d). The first two coordinates are drawn; for d = 1 the height is 0. Points that are
            not finite are left out.

    Returns:
        uint8, (3, SIDE, SIDE), on the CPU.
    """
    places = torch.nn.functional.pad(points.detach().cpu().double(), (0, 1))[:, :2].numpy()
    places = places[np.isfinite(places).all(axis=1)]
    limit = _round_up(float(np.abs(places).max(initial=0.0)))
    paper = np.asarray(_axes(limit), np.float64)
    # Rows count downward; the outermost pixel leaves room for half a dot.
    columns, rows = np.rint((places * (1, -1) / limit + 1) / 2 * (SIDE - 3)).astype(np.int64).T + 1
    counts = np.zeros((SIDE, SIDE))
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            np.add.at(counts, (rows + down, columns + right), 1)
    left = (1 - _OPACITY) ** counts[..., None]
    picture = left * paper + (1 - left) * _INK
    return torch.from_numpy(np.rint(picture).astype(np.uint8)).permute(2, 0, 1).contiguous()


def _round_up(value: float) -> float:
    """Return the least 1, 2 or 5 times a power of ten that is >= value; 1 for 0."""
    if value == 0 or not 1e-300 < value < 1e300:
        return 1.0 if value < 1 else value
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * (1 - 1e-9))


def _axes(limit: float) -> Image.Image:
    paper = Image.new("RGB", (SIDE, SIDE), "white")
    draw, middle = ImageDraw.Draw(paper), SIDE // 2
    draw.line((0, middle, SIDE, middle), _AXES)
    draw.line((middle, 0, middle, SIDE), _AXES)
    draw.text((4, middle + 2), f"{-limit:g}", "black")
    draw.text((SIDE - 4, middle + 2), f"{limit:g}", "black", anchor="ra")
    return paper
