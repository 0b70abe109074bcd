"""Covered modes and points of high quality, by hand and against numpy's moments of the real points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distgan.errors import UserError
from distgan.evaluation.metrics.mode_coverage import MixtureMoments, ModeCoverage, Modes

RING = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(8) * 2 * math.pi / 8]).double()
RING_MODES = Modes(RING, torch.tensor(0.01).double())


def test_points_at_a_given_distance() -> None:
    """Within three standard deviations, the border included; farther off, of no mode at all."""
    metric = ModeCoverage(Modes(RING, torch.tensor(0.25).double()))
    metric.update(torch.tensor([[1.75, 0.0], [-1.76, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 30.0]]))
    found = metric.compute()
    assert int(found.covered) == 3
    assert float(found.high_quality) == pytest.approx(3 / 5)


def test_the_real_mixture_and_a_collapse() -> None:
    """Of a normal distribution in the plane, 1 - exp(-9/2) of the points are within three standard deviations."""
    generator = torch.Generator().manual_seed(0)
    points = RING.repeat(500, 1) + 0.01 * torch.randn(4000, 2, generator=generator)
    metric = ModeCoverage(RING_MODES)
    for part in points.split(300):
        metric.update(part)
    found = metric.compute()
    assert int(found.covered) == 8
    expected = 1 - math.exp(-4.5)
    assert float(found.high_quality) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    metric.reset()
    metric.update(points[::8])
    assert int(metric.compute().covered) == 1


def test_points_between_modes_and_broken_ones_count_for_none() -> None:
    metric = ModeCoverage(RING_MODES)
    metric.update(torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 0.0], [1.0, 0.0]]))
    assert int(metric.compute().covered) == 1
    assert float(metric.compute().high_quality) == 0.25


def test_modes_of_labelled_points_equal_numpy() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 400)
    labels[labels == 3] = 1  # a number that no point has
    points = generator.normal(size=(5, 3))[labels] + 0.05 * generator.normal(size=(400, 3))
    metric = MixtureMoments(5, 3)
    for rows in np.array_split(np.arange(400), 9):
        metric.update(torch.from_numpy(points[rows]).float(), torch.from_numpy(labels[rows]))
    found = metric.compute()
    centers = np.stack([points[labels == mode].mean(0) for mode in (0, 1, 2, 4)])
    np.testing.assert_allclose(found.centers, centers, rtol=1e-5)
    within = np.concatenate([points[labels == mode] - points[labels == mode].mean(0) for mode in (0, 1, 2, 4)])
    assert float(found.deviation) == pytest.approx(math.sqrt((within**2).sum() / (3 * (400 - 4))), rel=1e-5)


def test_modes_need_points() -> None:
    metric = MixtureMoments(4, 2)
    metric.update(torch.eye(2), torch.tensor([0, 2]))
    with pytest.raises(UserError, match="no mode with two real points"):
        metric.compute()
