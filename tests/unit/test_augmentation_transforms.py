"""ADA's transforms against scipy's operators, hand calculation and the paper's formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distgan.losses.augmentation.ada import Corruption, add_noise, cut_out
from distgan.losses.augmentation.color import Color, adjust_color
from distgan.losses.augmentation.frequency import band_filters, filter_bands
from distgan.losses.augmentation.geometry import Geometry, inverse_map
from distgan.losses.augmentation.resampling import SYM6, _doubling, _positions, _sample, _sample_by_index, resample


def geometry(**values: float) -> Geometry:
    neutral = {name: float(name in ("scale", "stretch")) for name in Geometry._fields}
    return Geometry(**{name: torch.tensor([values.get(name, value)]) for name, value in neutral.items()})


def color(**values: float) -> Color:
    neutral = {name: float(name in ("contrast", "saturation")) for name in Color._fields}
    return Color(**{name: torch.tensor([values.get(name, value)]) for name, value in neutral.items()})


def moved(images: Tensor, **values: float) -> Tensor:
    return resample(images, inverse_map(geometry(**values)).expand(len(images), -1, -1))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def smooth(side: int = 32, channels: int = 3) -> Tensor:
    """An image whose finest waves are about 16 pixels long."""
    x, y = torch.meshgrid(torch.arange(side) / 16.0, torch.arange(side) / 16.0, indexing="xy")
    return torch.stack([(2 * math.pi * (x * a + y * b) + a).cos() for a, b in [(0.3, 0.9), (0.8, 0.1), (0.5, 0.5)]])[
        None, :channels
    ]


def test_the_filter_is_a_symlet() -> None:
    """Orthonormal to its even shifts, of sum sqrt 2, with six vanishing moments; of those filters the symlet has the
    most linear phase, so that the mean place of its taps hardly differs from the center of their energy."""
    taps = np.array(SYM6)
    shifts = [taps[: len(taps) - 2 * shift] @ taps[2 * shift :] for shift in range(6)]
    assert shifts == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    places = np.arange(12) - 5
    for moment in range(6):
        assert ((-1.0) ** places * places**moment * taps).sum() == pytest.approx(0, abs=1e-6)
    assert abs((places * taps).sum() / taps.sum()) < 0.15
    assert abs((places * taps**2).sum()) < 0.16


@pytest.mark.parametrize("side", [4, 8, 28, 32, 64, 256])
def test_nothing_and_shifts_by_whole_pixels_are_exact(side: int) -> None:
    images = noise(2, 3, side, side)
    assert (moved(images) - images).abs().max() < 1e-5
    shifted = moved(images, whole_x=2, whole_y=-1)
    assert (shifted[:, :, :-1, 2:] - images[:, :, 1:, :-2]).abs().max() < 1e-5, "to the right, and up"
    by_fraction = moved(images, x=2, y=-1)
    assert (by_fraction - shifted).abs().max() < 1e-5
    assert (shifted[:, :, :-1, 0] - images[:, :, 1:, 2]).abs().max() < 1e-5, "continued by reflection"


def test_shifts_beyond_the_image_show_its_reflections() -> None:
    images = noise(1, 1, 8, 8)
    assert (moved(images, x=14) - images).abs().max() < 1e-5, "two sides less two pixels are a period"
    assert (moved(images, x=7)[..., :, 1:] - images.flip(3)[..., :, :-1]).abs().max() > 0.5
    assert (moved(images, x=7) - images.flip(3)).abs().max() < 1e-5, "one side less one pixel mirrors"


def test_flips_and_turns_of_a_smooth_image_keep_its_place() -> None:
    """The filter is not symmetric, so that they are not exact; a wrong phase of it would shift by half a pixel."""
    image = smooth()
    assert (moved(image, x=0.5) - image)[..., 3:-3, 3:-3].abs().max() > 0.15
    for name, expected in (
        ({"flip": 1.0}, image.flip(3)),
        ({"turns": 2.0}, image.flip(2, 3)),
        ({"turns": 1.0}, torch.rot90(image, 1, (2, 3))),
        ({"turns": 3.0}, torch.rot90(image, -1, (2, 3))),
        ({"first_angle": math.pi / 2}, torch.rot90(image, 1, (2, 3))),
        ({"second_angle": -math.pi / 2}, torch.rot90(image, -1, (2, 3))),
    ):
        inner = (moved(image, **name) - expected)[..., 3:-3, 3:-3]
        assert inner.abs().max() < 0.06, name


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(4, 12),
    width=st.integers(4, 12),
    values=st.lists(st.floats(-2, 2), min_size=6, max_size=6),
    seed=st.integers(0, 100),
)
def test_any_affine_map_equals_scipys_operators(height: int, width: int, values: list[float], seed: int) -> None:
    """Continue, insert zeros and filter, interpolate linearly, filter by the mirrored taps and drop every second."""
    image = noise(1, 1, height, width, seed=seed, dtype=torch.float64)
    inverse = torch.tensor(values, dtype=torch.float64).view(1, 2, 3)
    far = 8 * (height + width)
    wide = np.pad(image[0, 0].numpy(), far, mode="reflect")
    taps = np.array(SYM6)
    for axis in (0, 1):
        wide = scipy.signal.upfirdn(taps * math.sqrt(2), wide, up=2, axis=axis)
    # Pixel x of the image is at 2 (x + far) + 5 in `wide`, and at 2 x + 5 in what is sampled.
    y, x = np.meshgrid(np.arange(2 * height + 10) - 5, np.arange(2 * width + 10) - 5, indexing="ij")
    x, y = x - (width - 1), y - (height - 1)
    (a, b, c), (d, e, f) = inverse[0].numpy()
    places = (
        d * x + e * y + 2 * f + (height - 1) + 2 * far + 5,
        a * x + b * y + 2 * c + (width - 1) + 2 * far + 5,
    )
    sampled = scipy.ndimage.map_coordinates(wide, places, order=1)
    for axis in (0, 1):
        sampled = scipy.signal.upfirdn(taps[::-1] / math.sqrt(2), sampled, axis=axis)
    expected = sampled[11:-11:2, 11:-11:2]
    assert resample(image, inverse)[0, 0].numpy() == pytest.approx(expected, abs=1e-8)


def test_the_deterministic_sampling_equals_the_other() -> None:
    images, inverse = noise(3, 2, 12, 16), noise(3, 2, 3, seed=1)
    doubled = _doubling(12, images.dtype, images.device) @ images @ _doubling(16, images.dtype, images.device).mT
    x, y = _positions(inverse, 12, 16)
    assert torch.allclose(_sample(doubled, x, y), _sample_by_index(doubled, x, y), atol=2e-5)


def test_transforms_are_applied_in_the_papers_order() -> None:
    """Flip, quarter turns, whole shift, scale, rotation, stretch, rotation, shift: the product of their matrices."""
    parts = {
        "flip": 1.0, "turns": 3.0, "whole_x": 3.0, "whole_y": -2.0, "scale": 1.3, "first_angle": 0.4, "stretch": 0.7,
        "second_angle": -1.1, "x": 1.5, "y": 0.25,
    }  # fmt: skip

    def linear(*rows: tuple[float, float]) -> np.ndarray:
        return np.block([[np.array(rows), np.zeros((2, 1))], [np.zeros(2), 1.0]])

    def rotation(angle: float) -> np.ndarray:  # counterclockwise on the screen, where y points down
        return linear((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle)))

    def shift(x: float, y: float) -> np.ndarray:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])

    forward = [
        linear((-1, 0), (0, 1)), rotation(3 * math.pi / 2), shift(3, -2), linear((1.3, 0), (0, 1.3)), rotation(0.4),
        linear((0.7, 0), (0, 1 / 0.7)), rotation(-1.1), shift(1.5, 0.25),
    ]  # fmt: skip
    whole = np.eye(3)
    for step in forward:
        whole = step @ whole
    assert inverse_map(geometry(**parts))[0].numpy() == pytest.approx(np.linalg.inv(whole)[:2], abs=1e-6)


RED = np.array([0.8, -0.2, 0.1])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, RED),
        ({"brightness": 0.3}, RED + 0.3),
        ({"contrast": 1.5}, RED * 1.5),
        ({"brightness": 0.3, "contrast": 0.5}, (RED + 0.3) * 0.5),
        ({"luma_flip": 1.0}, RED - 2 * RED.mean()),
        ({"hue": 2 * math.pi / 3}, np.roll(RED, 1)),
        ({"hue": -2 * math.pi / 3}, np.roll(RED, -1)),
        ({"saturation": 0.0}, np.full(3, RED.mean())),
        ({"saturation": 2.0}, 2 * RED - RED.mean()),
    ],
)
def test_colors_by_hand(values: dict[str, float], expected: np.ndarray) -> None:
    """A turn by a third of the circle about the gray axis takes red to green, green to blue and blue to red."""
    image = torch.tensor(RED, dtype=torch.float64).view(1, 3, 1, 1)
    assert adjust_color(image, color(**values)).flatten().numpy() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-2, 2), min_size=4, max_size=4), flip=st.booleans())
def test_colors_are_the_papers_matrices(values: list[float], flip: bool) -> None:
    """Translation, scaling, Householder reflection, rotation about the gray axis, and scaling across it, in homogeneous
    coordinates; one channel has the gray value of three equal ones."""
    brightness, contrast, angle, saturation = values
    v = np.ones(3) / math.sqrt(3)
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    reflection = np.eye(3) - 2 * np.outer(v, v) * flip
    rotation = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    matrix = (np.outer(v, v) + (np.eye(3) - np.outer(v, v)) * saturation) @ rotation @ reflection * contrast
    image = noise(1, 3, 4, 5, dtype=torch.float64)
    expected = np.einsum("ij,jhw->ihw", matrix, image[0].numpy() + brightness)
    parameters = color(
        brightness=brightness, contrast=contrast, luma_flip=float(flip), hue=angle, saturation=saturation
    )
    assert adjust_color(image, parameters)[0].numpy() == pytest.approx(expected, abs=1e-5)
    gray = adjust_color(image[:, :1].expand(-1, 3, -1, -1), parameters)
    assert torch.allclose(gray[:, :1], adjust_color(image[:, :1], parameters))


def test_bands_have_the_responses_of_a_daubechies_filter_bank() -> None:
    """|H(w)|^2 / 2 = cos(w/2)^4 (1 + 2 sin(w/2)^2) for two vanishing moments (Daubechies 1992, section 6.1)."""
    frequencies = np.linspace(0, math.pi, 50)

    def low(w: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.cos(w / 2) ** 4 * (1 + 2 * np.sin(w / 2) ** 2)
        return found

    one, two, four = low(frequencies), low(2 * frequencies), low(4 * frequencies)
    expected = [four * two * one, (1 - four) * two * one, (1 - two) * one, 1 - one]
    for band, response in zip(band_filters(), expected, strict=True):
        places = np.arange(len(band)) - len(band) // 2
        assert np.exp(-1j * np.outer(frequencies, places)) @ band == pytest.approx(response, abs=1e-12)


def test_bands_without_amplification_give_the_image_back() -> None:
    images = noise(2, 3, 16, 12)
    assert torch.allclose(filter_bands(images, torch.ones(2, 4)), images, atol=1e-5)


def test_bands_of_an_image_equal_scipys_convolution() -> None:
    """With the expected power (10, 1, 1, 1)/13 brought back to 1 after each band's amplification."""
    image, factors = noise(1, 1, 32, 40, dtype=torch.float64), np.array([0.5, 2.0, 3.0, 0.7])
    power = np.array([10, 1, 1, 1]) / 13
    gains = np.ones(4)
    for band in range(4):
        amplified = np.where(np.arange(4) == band, factors, 1.0)
        gains *= amplified / math.sqrt((power * amplified**2).sum())
    length = len(band_filters()[0])
    kernel = sum(
        gain * np.pad(band, (length - len(band)) // 2) for gain, band in zip(gains, band_filters(), strict=True)
    )
    expected = image[0, 0].numpy()
    for axis in (0, 1):  # scipy calls reflection at the outermost pixels "mirror"
        expected = scipy.ndimage.convolve1d(expected, kernel, axis=axis, mode="mirror")
    found = filter_bands(image, torch.tensor(factors)[None])
    assert found[0, 0].numpy() == pytest.approx(expected, abs=1e-10)


def corruption(**values: float) -> Corruption:
    return Corruption(**{name: torch.tensor([values.get(name, 0.0)]) for name in Corruption._fields})


def test_noise_and_cutout() -> None:
    images, drawn = noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=1)
    assert torch.allclose(add_noise(images, corruption(noise=0.25), drawn), images + 0.25 * drawn)
    assert torch.equal(cut_out(images, corruption(x=0.5, y=0.5)), images)
    hole = cut_out(images, corruption(cutout=1, x=0.5, y=0.25)) == 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[0:4, 2:6] = True
    assert torch.equal(hole, expected.expand(1, 3, 8, 8))


EACH: dict[str, Any] = {
    "geometry": lambda x: moved(x, flip=1.0, turns=1.0, scale=0.8, first_angle=0.3, stretch=1.2, x=0.7),
    "color": lambda x: adjust_color(x, color(brightness=0.1, contrast=1.4, luma_flip=1.0, hue=0.4, saturation=2.0)),
    "bands": lambda x: filter_bands(x, torch.tensor([[0.5, 2.0, 1.5, 0.1]])),
    "cutout": lambda x: cut_out(x, corruption(cutout=1, x=0.4, y=0.1)),
}


@pytest.mark.parametrize("name", EACH)
def test_first_and_second_derivatives(name: str) -> None:
    image = noise(1, 3, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(EACH[name], (image,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: EACH[name](x).square(), (image,), fast_mode=True)
    assert torch.autograd.gradgradcheck(EACH[name], (image,), fast_mode=True)
