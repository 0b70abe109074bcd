"""Divergences against closed forms, hand calculations, scipy, and the laws that hold for all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from distgan.evaluation.divergences import (
    js_divergence,
    kl_divergence,
    squared_mmd,
    squared_wasserstein_of_normals,
    wasserstein,
    wasserstein_of_samples,
)

Array = NDArray[np.float64]
histograms = hnp.arrays(np.float64, 6, elements=st.floats(1e-3, 10))
sparse = hnp.arrays(np.float64, 6, elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])).filter(lambda p: p.sum() > 0)
points = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-5, 5))


def test_moving_earth_by_hand() -> None:
    p, q = torch.tensor([3, 2, 1, 4]), torch.tensor([1, 2, 4, 3])
    # Cumulative differences 2, 2, -1: two units are carried from the first bin to the third, one from the last.
    assert float(wasserstein(p, q)) == 5
    assert float(wasserstein(p / p.sum(), q / q.sum())) == pytest.approx(0.5, rel=1e-7)
    with pytest.raises(ValueError, match="sums 10 and 9"):
        wasserstein(p, torch.tensor([1, 2, 4, 2]))


@pytest.mark.parametrize("theta", [-2, -1, 0, 1, 3])
def test_parallel_segments(theta: int) -> None:
    """(0, Z) and (theta, Z) with Z uniform (Arjovsky et al. 2017, example 1), on a grid: only W sees how far."""
    places = torch.arange(-4, 5)
    p, q = ((places == x).double()[:, None].expand(9, 20) / 20 for x in (0, theta))
    apart = theta != 0
    assert float(kl_divergence(p.flatten(), q.flatten())) == (math.inf if apart else 0)
    assert float(js_divergence(p.flatten(), q.flatten())) == pytest.approx(math.log(2) if apart else 0)
    assert float(wasserstein(p.sum(1), q.sum(1))) == pytest.approx(abs(theta))
    assert float(wasserstein_of_samples(torch.zeros(20), torch.full((20,), theta))) == pytest.approx(abs(theta))


def test_the_optimal_discriminator_meets_js() -> None:
    """V* = E_p log D* + E_q log(1 - D*) = 2 JS - 2 log 2 with D* = p / (p + q) (Goodfellow et al. 2014, eq. 4-6)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    best = p / (p + q)
    value = (p * best.log() + q * (1 - best).log()).sum()
    assert float(value) == pytest.approx(2 * float(js_divergence(p, q)) - 2 * math.log(2))


@given(sparse, sparse)
def test_histograms_equal_scipy(p: Array, q: Array) -> None:
    first, second = torch.from_numpy(p), torch.from_numpy(q)
    assert float(kl_divergence(first, second)) == pytest.approx(scipy.stats.entropy(p, q), rel=1e-12, abs=1e-15)
    mixture = p / p.sum() + q / q.sum()
    expected = (scipy.stats.entropy(p, mixture) + scipy.stats.entropy(q, mixture)) / 2
    assert float(js_divergence(first, second)) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    bins = np.arange(6)
    moved = scipy.stats.wasserstein_distance(bins, bins, p, q)
    assert float(wasserstein(first / p.sum(), second / q.sum())) == pytest.approx(moved, rel=1e-12, abs=1e-15)


@given(histograms, histograms)
def test_laws_of_histograms(p: Array, q: Array) -> None:
    first, second = torch.from_numpy(p), torch.from_numpy(q)
    js = float(js_divergence(first, second))
    assert js == pytest.approx(float(js_divergence(second, first)), abs=1e-15)
    assert -1e-15 <= js <= math.log(2)
    assert float(kl_divergence(first, second)) >= -1e-15
    assert float(kl_divergence(first, 7 * first)) == pytest.approx(0, abs=1e-15)
    assert float(js_divergence(first, first)) == pytest.approx(0, abs=1e-15)
    # Pinsker: the total variation is at most the root of half of KL.
    variation = np.abs(p / p.sum() - q / q.sum()).sum() / 2
    assert variation <= math.sqrt(max(0.0, float(kl_divergence(first, second))) / 2) + 1e-7


@given(points, points, points)
def test_samples_equal_scipy_and_form_a_metric(x: Array, y: Array, z: Array) -> None:
    def distance(a: Array, b: Array) -> float:
        return float(wasserstein_of_samples(torch.from_numpy(a), torch.from_numpy(b)))

    assert distance(x, y) == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-12, abs=1e-12)
    assert distance(x, y) == pytest.approx(distance(y, x), abs=1e-12)
    assert distance(x, x) == 0
    assert distance(x, z) <= distance(x, y) + distance(y, z) + 1e-12
    assert distance(x + 3, y + 3) == pytest.approx(distance(x, y), abs=1e-9)


@given(points)
def test_as_many_samples_are_matched_in_order(x: Array) -> None:
    y = np.sin(np.arange(len(x)))
    costs = np.abs(x[:, None] - y[None])
    matched = costs[scipy.optimize.linear_sum_assignment(costs)].mean()
    assert float(wasserstein_of_samples(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(matched, abs=1e-12)


def covariance_of(generator: np.random.Generator, dimension: int, rank: int) -> Array:
    factor = generator.normal(size=(dimension, rank))
    return factor @ factor.T


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_normals_equal_a_general_matrix_root(seed: int, dimension: int) -> None:
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(2, dimension))
    covariances = [covariance_of(generator, dimension, dimension + 1) for _ in range(2)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    sides = [(torch.from_numpy(m), torch.from_numpy(c)) for m, c in zip(means, covariances, strict=True)]
    found = float(squared_wasserstein_of_normals(*sides[0], *sides[1]))
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert found == pytest.approx(float(squared_wasserstein_of_normals(*sides[1], *sides[0])), rel=1e-8, abs=1e-8)
    assert float(squared_wasserstein_of_normals(*sides[0], *sides[0])) == pytest.approx(0, abs=1e-8)


def test_normals_by_hand_and_without_full_rank() -> None:
    one = torch.tensor([1.0, 0]), torch.tensor([4.0, 0]).diag()
    other = torch.tensor([4.0, 0]), torch.tensor([25.0, 9]).diag()
    assert float(squared_wasserstein_of_normals(*one, *other)) == pytest.approx(3**2 + (5 - 2) ** 2 + 3**2)


def test_normals_equal_the_distance_of_evaluation() -> None:
    from distgan.evaluation.metrics.frechet import frechet_distance, make_reference
    from distgan.evaluation.moments import Gaussian

    generator = np.random.default_rng(0)
    sides = [
        (torch.from_numpy(generator.normal(size=20)), torch.from_numpy(covariance_of(generator, 20, 30)))
        for _ in range(2)
    ]
    found = frechet_distance(make_reference(Gaussian(99, *sides[0])), Gaussian(99, *sides[1]))
    assert float(squared_wasserstein_of_normals(*sides[0], *sides[1])) == pytest.approx(float(found), rel=1e-9)


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_mmd_equals_the_double_loop(width: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator) + 1

    def value(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-sum((float(s) - float(t)) ** 2 for s, t in zip(a, b, strict=True)) / width)

    expected = sum(value(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    expected += sum(value(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    expected -= 2 * sum(value(a, b) for a in x for b in y) / (7 * 5)
    found = squared_mmd(x, y, lambda a, b: (-torch.cdist(a, b).square() / width).exp())
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_unbiased() -> None:
    """With the linear kernel its mean is |E x - E y|^2, here 0; the biased estimate's would be 2 d / n = 1."""
    samples = torch.randn(4000, 2, 8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = [float(squared_mmd(x, y, lambda a, b: a @ b.T)) for x, y in samples]
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / math.sqrt(len(found)))
