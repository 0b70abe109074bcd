"""Samples on their way between data and networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import Config, parse_config
from distgan.inference.generation import dequantize, from_network, statistics_batches, to_network
from distgan.inference.latents import LatentSource
from distgan.networks.shape import SampleShape

IMAGES = SampleShape("images", resolution=16, channels=1)
TEXT = SampleShape("text", length=5, vocabulary=7)
POINTS = SampleShape("points", dimensions=2)


def test_pixels_come_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    seen = to_network(IMAGES, values)
    assert (seen.min(), seen.max(), seen.dtype) == (-1, 1, torch.float32)
    assert torch.allclose(seen.flatten(), torch.linspace(-1, 1, 256), atol=1e-6)
    assert torch.equal(from_network(IMAGES, seen), values)


def test_generated_pixels_are_rounded_and_clamped() -> None:
    made = torch.tensor([-3.0, -1.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 1.0, 7.0]).view(1, 1, 2, 3)
    assert from_network(IMAGES, made).flatten().tolist() == [0, 0, 0, 1, 255, 255]


@given(st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), min_size=1, max_size=4))
def test_characters_become_one_hot_and_come_back(lines: list[list[int]]) -> None:
    values = torch.from_numpy(np.array(lines, np.uint16))
    seen = to_network(TEXT, values)
    assert seen.shape == (len(lines), *TEXT.sizes)
    assert seen.dtype == torch.float32
    expected = np.eye(7, dtype=np.float32)[np.array(lines)].transpose(0, 2, 1)
    assert np.array_equal(seen.numpy(), expected)
    back = from_network(TEXT, seen)
    assert back.dtype == torch.int64
    assert back.tolist() == lines


def test_the_most_probable_character_is_taken() -> None:
    probabilities = torch.tensor([[[0.2, 0.1], [0.5, 0.3], [0.3, 0.6]]])
    assert from_network(SampleShape("text", length=2, vocabulary=3), probabilities).tolist() == [[1, 2]]


def test_points_stay_as_they_are() -> None:
    values = torch.randn(3, 2)
    assert torch.equal(to_network(POINTS, values), values)
    assert torch.equal(from_network(POINTS, values.bfloat16()), values.bfloat16().float())


def test_dequantized_pixels_fill_their_bins() -> None:
    """2 (x/256 - 1/2) + U[0, 1/128): bins of one width that meet, from -1 to 1."""
    pixels = torch.tensor([0, 1, 128, 255], dtype=torch.uint8)
    assert dequantize(pixels, torch.zeros(4)).tolist() == [-1.0, -1 + 1 / 128, 0.0, 1 - 1 / 128]
    assert torch.allclose(dequantize(pixels, torch.full((4,), 1.0)), pixels.float() / 128 - 1 + 1 / 128)


@pytest.mark.parametrize(("batch_size", "sizes"), [(2048, [128] * 16), (96, [96] * 21), (4096, [128] * 16)])
def test_batches_for_statistics_fit_on_one_device(batch_size: int, sizes: list[int]) -> None:
    """And there are the same ones for any number of ranks, each on one of them."""
    config: Config = parse_config({
        "run_dir": "r", "data": {"path": "d", "resolution": 32}, "training": {"steps": 5, "batch_size": batch_size},
    })  # fmt: skip
    source = LatentSource(config.generator, 0, class_counts=None)
    expected = [latents for latents, _ in statistics_batches(source, config)]
    assert [len(latents) for latents in expected] == sizes
    for world_size in (4, 64):
        shares = [
            [latents for latents, _ in statistics_batches(source, config, rank=rank, world_size=world_size)]
            for rank in range(world_size)
        ]
        assert max(map(len, shares)) == -(-len(sizes) // world_size)
        for number, latents in enumerate(expected):
            assert torch.equal(shares[number % world_size][number // world_size], latents)
