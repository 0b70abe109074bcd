"""Widths of StyleGAN2's networks."""

from __future__ import annotations

from distgan.errors import UserError
from distgan.networks.shape import SampleShape


def widths_from_images(role: str, shape: SampleShape, width: int, max_width: int) -> list[int]:
    """Return the channels at R, R/2, ..., 4 pixels: min(width R / r, max_width) at r pixels.

    Raises:
        UserError: R is below 4.
    """
    if shape.resolution < 4:
        raise UserError(
            f"data.resolution = {shape.resolution}: the stylegan2 {role} supports powers of two from 4 up; set one of "
            "these; images are resized to it"
        )
    return [min(width << level, max_width) for level in range(shape.resolution.bit_length() - 2)]
