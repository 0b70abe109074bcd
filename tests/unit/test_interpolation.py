"""Paths between latents, by hand and by the geometry of the sphere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distgan.interpolation import Path, latent_paths, lerp, slerp

SHARES = torch.tensor([0.0, 1 / 3, 0.5, 1.0])


def test_orthogonal_vectors_by_hand() -> None:
    """From (2, 0) to (0, 1) at a third of the right angle: (2 sin 60, sin 30)."""
    found = slerp(torch.tensor([[2.0, 0]]), torch.tensor([[0.0, 1]]), SHARES)[0]
    assert found.dtype == torch.float32
    expected = [[2, 0], [math.sqrt(3), 0.5], [math.sqrt(2), math.sqrt(0.5)], [0, 1]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.0, -1.0, 1 + 1e-9])
def test_parallel_vectors_are_joined_by_a_line(scale: float) -> None:
    start = torch.tensor([[0.3, -0.4, 1.2]]).double()
    found = slerp(start, scale * start, SHARES)
    torch.testing.assert_close(found, lerp(start, scale * start, SHARES), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0, 2], start[0] * (1 + scale) / 2, rtol=1e-7, atol=1e-12)


def test_a_zero_vector_is_joined_by_a_line() -> None:
    assert slerp(torch.zeros(1, 2), torch.tensor([[2.0, 4.0]]), torch.tensor([0.5])).tolist() == [[[1.0, 2.0]]]


@pytest.mark.parametrize("path", [slerp, lerp])
def test_ends_are_met(path: Path) -> None:
    start, end = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    found = path(start, end, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found[:, 0], start, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[:, 1], end, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_on_the_sphere_the_angle_grows_evenly(seed: int, share: float) -> None:
    start, end = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start, end = start / start.norm(), end / end.norm()
    found = slerp(start, end, torch.tensor([share]).double())[0, 0]
    assert float(found.norm()) == pytest.approx(1, rel=1e-9)
    whole = math.acos(float((start * end).sum()))
    assert math.acos(min(1.0, float((start[0] * found).sum()))) == pytest.approx(share * whole, abs=1e-6)


def test_paths_join_neighbors_and_keep_the_label_of_their_start() -> None:
    latents, labels = latent_paths(torch.arange(8.0).view(4, 2), torch.tensor([7, 8, 9, 6]), 3, lerp)
    assert latents.tolist() == [[0, 1], [1, 2], [2, 3], [4, 5], [5, 6], [6, 7]]
    assert labels is not None
    assert labels.tolist() == [7, 7, 7, 9, 9, 9]
    assert latent_paths(torch.eye(2), None, 5)[1] is None
