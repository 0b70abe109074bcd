"""The augmentations of ADA (Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix
B, of which StyleGAN2-ADA's released code is the other source)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distgan.losses.augmentation import AugmentationDraws
from distgan.losses.augmentation.color import Color, adjust_color
from distgan.losses.augmentation.frequency import BANDS, filter_bands
from distgan.losses.augmentation.geometry import Geometry, inverse_map
from distgan.losses.augmentation.resampling import resample

_CHANCES, _UNIFORMS, _NORMALS = 19, 10, 12
"""Numbers per sample that choose the transforms, and that their parameters are made of."""


class Corruption(NamedTuple):
    """Noise and cutout, (n,) each."""

    noise: Tensor
    """Standard deviation of the noise."""
    cutout: Tensor
    """1 to set a rectangle of half the width and height to 0, else 0."""
    x: Tensor
    """Center of the rectangle, as a fraction of the width."""
    y: Tensor
    """Center of the rectangle, as a fraction of the height."""


class Parameters(NamedTuple):
    """What is done to each of n samples. A transform that is not applied has the value that changes nothing."""

    geometry: Geometry
    color: Color
    bands: Tensor
    """Factors of the frequency bands, (n, 4)."""
    corruption: Corruption


class Ada:
    """Transforms of images, each applied to a sample with its multiplier times the probability.

    Geometry is one resampling. The transforms are applied in the order of the arguments, which are their multipliers.
    The random numbers of a sample do not depend on the multipliers.
    """

    def __init__(
        self,
        *,
        flip: float = 1.0,
        quarter_turns: float = 1.0,
        integer_translation: float = 1.0,
        scaling: float = 1.0,
        rotation: float = 1.0,
        anisotropic_scaling: float = 1.0,
        fractional_translation: float = 1.0,
        brightness: float = 1.0,
        contrast: float = 1.0,
        luma_flip: float = 1.0,
        hue: float = 1.0,
        saturation: float = 1.0,
        frequency_filter: float = 0.0,
        noise: float = 0.0,
        cutout: float = 0.0,
    ) -> None:
        self._pixels = flip, quarter_turns, integer_translation
        self._geometry = scaling, rotation, anisotropic_scaling, fractional_translation
        self._color = brightness, contrast, luma_flip, hue, saturation
        self._filter, self._noise, self._cutout = frequency_filter, noise, cutout

    def __call__(self, images: Tensor, draws: AugmentationDraws) -> Tensor:
        """Return augmented images (n, C, H, W), C 1 or 3. Images are in [-1, 1]; the result may exceed that."""
        parameters = self.parameters(draws, height=images.shape[2], width=images.shape[3])
        if any(self._pixels + self._geometry):
            images = resample(images, inverse_map(parameters.geometry))
        if any(self._color):
            images = adjust_color(images, parameters.color)
        if self._filter:
            images = filter_bands(images, parameters.bands)
        if self._noise:
            images = add_noise(images, parameters.corruption, draws.normal("noise", *images.shape[1:]))
        return cut_out(images, parameters.corruption) if self._cutout else images

    def parameters(self, draws: AugmentationDraws, *, height: int, width: int) -> Parameters:
        """Draw what is done to each sample of this height and width in pixels."""
        # One draw of each kind, because a draw launches about a hundred small operations.
        drawn = draws.uniform("uniform parameters", _CHANCES + _UNIFORMS).unbind(1)
        chances, uniforms = iter(drawn[:_CHANCES]), iter(drawn[_CHANCES:])
        normals = iter(draws.normal("normal parameters", _NORMALS).unbind(1))

        def applied(multiplier: float, value: Tensor, neutral: float = 0.0, chance: Tensor | None = None) -> Tensor:
            chance = next(chances) if chance is None else chance
            return torch.where(chance < multiplier * draws.probability, value, neutral)

        def whole(count: int) -> Tensor:
            return (next(uniforms) * count).floor()

        def between(limit: float) -> Tensor:
            return (2.0 * next(uniforms) - 1.0) * limit

        flip, turns, translation = self._pixels
        scaling, rotation, anisotropy, fraction = self._geometry
        brightness, contrast, luma_flip, hue, saturation = self._color
        together, apart = next(chances), next(chances)
        geometry = Geometry(
            flip=applied(flip, whole(2)),
            turns=applied(turns, whole(4)),
            whole_x=applied(translation, (between(0.125) * width).round(), chance=together),
            whole_y=applied(translation, (between(0.125) * height).round(), chance=together),
            scale=applied(scaling, (0.2 * next(normals)).exp2(), 1.0),
            first_angle=self._rotated(rotation, next(chances), between(math.pi), draws),
            stretch=applied(anisotropy, (0.2 * next(normals)).exp2(), 1.0),
            second_angle=self._rotated(rotation, next(chances), between(math.pi), draws),
            x=applied(fraction, 0.125 * width * next(normals), chance=apart),
            y=applied(fraction, 0.125 * height * next(normals), chance=apart),
        )
        color = Color(
            brightness=applied(brightness, 0.2 * next(normals)),
            contrast=applied(contrast, (0.5 * next(normals)).exp2(), 1.0),
            luma_flip=applied(luma_flip, whole(2)),
            hue=applied(hue, between(math.pi)),
            saturation=applied(saturation, next(normals).exp2(), 1.0),
        )
        bands = [applied(self._filter, next(normals).exp2(), 1.0) for _ in range(BANDS)]
        corruption = Corruption(
            noise=applied(self._noise, (0.1 * next(normals)).abs()),
            cutout=applied(self._cutout, torch.ones_like(together)),
            x=next(uniforms),
            y=next(uniforms),
        )
        return Parameters(geometry, color, torch.stack(bands, dim=1), corruption)

    @staticmethod
    def _rotated(multiplier: float, chance: Tensor, angle: Tensor, draws: AugmentationDraws) -> Tensor:
        """Apply one of the two rotations so often that at least one is applied with the multiplied probability."""
        neither = 1.0 - multiplier * draws.probability
        return torch.where(chance < 1.0 - neither**0.5, angle, 0.0)


def add_noise(images: Tensor, corruption: Corruption, noise: Tensor) -> Tensor:
    """Add N(0, sigma^2), given noise from N(0, 1) of the images' shape."""
    return images + corruption.noise.to(images.dtype).view(-1, 1, 1, 1) * noise.to(images.dtype)


def cut_out(images: Tensor, corruption: Corruption) -> Tensor:
    """Set the pixels to 0 whose centers are nearer than a quarter of the side to the rectangle's center, on both
    axes."""
    rows, columns = (
        ((torch.arange(side, device=images.device) + 0.5) / side - center[:, None]).abs() < 0.25
        for side, center in ((images.shape[2], corruption.y), (images.shape[3], corruption.x))
    )
    inside = rows[:, :, None] & columns[:, None, :] & (corruption.cutout > 0)[:, None, None]
    return images.masked_fill(inside[:, None], 0.0)
