"""The sliced Wasserstein distance against scipy's convolutions and distances."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distgan import randomness
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.metrics import sliced_wasserstein
from distgan.evaluation.metrics.sliced_wasserstein import descriptors, directions, normalized, sliced_distance
from distgan.evaluation.numerics.laplacian_pyramid import enlarged, laplacian_pyramid, level_sizes
from distgan.evaluation.suite import Evaluator
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index

FILTER = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def noise(count: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=draws).to(torch.uint8)


def pyramid_of(images: np.ndarray, levels: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    """The levels by scipy's two-dimensional convolution, whose mirror does not repeat the edge."""
    found = [images.astype(np.float64)]
    for _ in range(levels - 1):
        half = scipy.ndimage.convolve(found[-1], FILTER[None, None], mode="mirror")[:, :, ::2, ::2]
        zeros = np.zeros_like(found[-1])
        zeros[:, :, ::2, ::2] = half
        found[-1] = found[-1] - scipy.ndimage.convolve(zeros, 4 * FILTER[None, None], mode="mirror")
        found.append(half)
    return found


def test_sizes_of_the_levels() -> None:
    assert level_sizes(128) == [128, 64, 32, 16]
    assert level_sizes(96) == [96, 48, 24]
    assert level_sizes(28) == [28]


@pytest.mark.parametrize("size", [64, 48, 16])
def test_levels_equal_scipys_and_add_up_to_the_image(size: int) -> None:
    images = noise(2, size)
    levels = laplacian_pyramid(images, len(level_sizes(size)))
    for found, expected in zip(levels, pyramid_of(images.numpy(), len(levels)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-10)
    total = levels[-1]
    for level in levels[-2::-1]:
        total = enlarged(total) + level
    assert torch.equal(total, images.double())


def test_descriptors_are_neighborhoods_at_addressed_places() -> None:
    images = noise(5, 20, channels=2).double()
    numbers = torch.arange(5)
    found = descriptors(images, numbers)
    assert found.shape == (5, 128, 2, 49)
    y, x = randomness.integers(0, "sliced_wasserstein/places 20", numbers, 14, (2, 128)).unbind(1)
    assert (int(x.min()), int(x.max()), int(y.min()), int(y.max())) == (0, 13, 0, 13)
    for i, place in ((0, 0), (3, 77), (4, 127)):
        patch = images[i, :, y[i, place] : y[i, place] + 7, x[i, place] : x[i, place] + 7]
        assert torch.equal(found[i, place], patch.flatten(1).float())
    alone = descriptors(images[3:4], numbers[3:4])
    assert torch.equal(alone[0], found[3])


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 99))
def test_distance_is_the_mean_of_scipys_over_directions(count: int, dimension: int, seed: int) -> None:
    first, second = torch.randn(2, count, dimension, generator=torch.Generator().manual_seed(seed))
    with patch.object(sliced_wasserstein, "DIRECTIONS", 20):
        unit = directions(dimension)
        np.testing.assert_allclose(unit.norm(dim=1), 1, rtol=1e-6)
        expected = np.mean([scipy.stats.wasserstein_distance(first @ along, second @ along) for along in unit])
        assert float(sliced_distance(first, second)) == pytest.approx(expected, rel=1e-5)
        assert float(sliced_distance(first, first.flip(0))) == pytest.approx(0, abs=1e-6)


def test_distance_on_a_line_by_hand() -> None:
    """{0, 1} and {5, 2}: |0 - 2| and |1 - 5|, the same along both directions of the line."""
    assert float(sliced_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [2.0]]))) == 3


def test_channels_are_normalized_each() -> None:
    rows = torch.tensor([[[[0.0, 2.0], [5.0, 5.0]]], [[[4.0, 2.0], [5.0, 5.0]]]])  # two images, one place, two channels
    root = 2**0.5
    expected = torch.tensor([[-root, 0, 0, 0], [root, 0, 0, 0]])
    assert torch.allclose(normalized(rows), expected)


def numpys_distance(fakes: Tensor, reals: Tensor, numbers: Tensor, size: int) -> float:
    sides = []
    for images in (fakes, reals):
        level = dict(zip(level_sizes(32), pyramid_of(images.numpy(), 2), strict=True))[size]
        rows = descriptors(torch.from_numpy(level), numbers).numpy().astype(np.float64)
        rows = (rows - rows.mean((0, 1, 3), keepdims=True)) / rows.std((0, 1, 3), keepdims=True)
        sides.append(rows.reshape(-1, rows.shape[2] * 49) @ directions(rows.shape[2] * 49).numpy().T)
    pairs = zip(*(side.T for side in sides), strict=True)
    return 1000 * float(np.mean([scipy.stats.wasserstein_distance(a, b) for a, b in pairs]))


def test_an_evaluation_equals_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced_wasserstein, "DIRECTIONS", 20)
    reals = pictures(40, size=32)
    shards = write_shards(tmp_path / "shards", reals)
    fakes = 255 - pictures(50, size=32).flip(3)

    def evaluated(images: Tensor, most: int) -> dict[str, float]:
        metric = {"metric": "sliced_wasserstein", "max_images": most}
        config = evaluation_config(shards, tmp_path / "cache", resolution=32, num_samples=45, metrics=[metric])
        return Evaluator(config, build_index(shards), Runtime())(lambda numbers: images[numbers])

    found = evaluated(fakes, 1000)
    numbers = torch.arange(40)
    for size in (32, 16):
        expected = numpys_distance(fakes[:40], reals, numbers, size)
        assert expected > 10
        assert found[f"sliced_wasserstein[{size}]"] == pytest.approx(expected, rel=1e-5)
    assert list(found) == ["sliced_wasserstein", "sliced_wasserstein[32]", "sliced_wasserstein[16]"]
    assert found["sliced_wasserstein"] == pytest.approx(
        (found["sliced_wasserstein[32]"] + found["sliced_wasserstein[16]"]) / 2
    )
    same = torch.cat((reals, reals))
    assert set(evaluated(same, 1000).values()) == {0.0}
    assert 0 < evaluated(same, 10)["sliced_wasserstein"] < found["sliced_wasserstein"]  # other images


def test_small_images_are_a_mistake(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", pictures(20))
    config = evaluation_config(shards, tmp_path, resolution=8, metrics=["sliced_wasserstein"])
    with pytest.raises(UserError, match="images of 8 pixels per side, expected at least 16"):
        Evaluator(config, build_index(shards), Runtime())
