"""Amplification of frequency bands, ADA's image-space filter (Karras et al. 2020, "Training Generative Adversarial
Networks with Limited Data", appendix B)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from distgan.losses.augmentation.resampling import reflect

BANDS = 4
"""Octaves, from the lowest frequencies, [0, pi/8] of each axis, to the highest, [pi/2, pi]."""
_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)
"""Expected share of each band in the power of a natural image."""
_HALF_BAND = np.array([-1, 0, 9, 16, 9, 0, -1]) / 32
"""Autocorrelation of the Daubechies filter with two vanishing moments, which the paper calls sym2."""


def filter_bands(images: Tensor, factors: Tensor) -> Tensor:
    """Amplify the bands of images (n, C, H, W) by factors (n, 4), then normalize the expected power.

    The power is normalized once for each band, as if the bands were amplified one after another. The filter is applied
    along both axes, to images that are continued by reflection.
    """
    gains = factors.to(images.dtype)
    for factor, share in zip(gains.unbind(1), _POWER, strict=True):
        # The shares sum to 1, so that a factor of one band makes the power 1 + share (factor^2 - 1).
        gains = gains / (1.0 + share * (factor.square() - 1.0)).sqrt()[:, None]
    rows, columns = (_filters(gains, side) for side in images.shape[-2:])
    filtered: Tensor = rows[:, None] @ images @ columns[:, None].mT
    return filtered


def _filters(gains: Tensor, length: int) -> Tensor:
    """Return one filter per image as a matrix, (n, length, length)."""
    bands = _bands(length, gains.dtype, gains.device)
    # Not a matrix product, whose sums may be of another order in a batch of another size.
    weighted = (gain[:, None, None] * band for gain, band in zip(gains.unbind(1), bands, strict=True))
    return sum(weighted, torch.zeros((), dtype=gains.dtype, device=gains.device))


def band_filters() -> list[np.ndarray]:
    """Return the filters of the bands, from low to high frequencies. They are symmetric, and their sum is a unit
    impulse."""
    high = -_HALF_BAND.copy()
    high[len(high) // 2] += 1
    bands = [np.ones(1)]
    for _ in range(BANDS - 1):
        spread = [np.zeros(2 * len(band) - 1) for band in bands]
        for wide, band in zip(spread, bands, strict=True):
            wide[::2] = band
        bands = [*(np.convolve(wide, _HALF_BAND) for wide in spread), high]
    return bands


@cache
def _bands(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return each band's filter as a matrix on a line of pixels, (4, length, length)."""
    matrices = np.zeros((BANDS, length, length))
    for matrix, band in zip(matrices, band_filters(), strict=True):
        for place in range(length):
            for tap, value in enumerate(band):
                matrix[place, reflect(place + tap - len(band) // 2, length)] += value
    return torch.from_numpy(matrices).to(device, dtype)
