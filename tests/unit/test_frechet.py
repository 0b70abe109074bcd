"""The Fréchet distance against closed forms, exact factorisations and other programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from distgan.evaluation.metrics.frechet import (
    FrechetDistanceToReference,
    frechet_distance,
    make_reference,
    triangular_factor,
)
from distgan.evaluation.moments import Gaussian, Moments


def gaussian_of(features: Tensor) -> Gaussian:
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.compute()


def distance(one: Gaussian, other: Gaussian) -> float:
    return float(frechet_distance(make_reference(one), other))


def features_of(count: int, dimension: int, seed: int, decades: float = 0.0) -> Tensor:
    """Correlated features whose standard deviations span so many decades."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -decades, dimension, dtype=torch.float64)
    rotation = torch.linalg.qr(
        torch.eye(dimension, dtype=torch.float64)
        + torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / 9
    )[0]
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) * scales @ rotation + 0.1 * seed


def exact_distance(one: Tensor, other: Tensor) -> float:
    """From the samples: tr (S1 S2)^(1/2) is the sum of singular values of X1 X2^T, X the centered, scaled samples."""
    a, b = (((x - x.mean(0)) / np.sqrt(len(x) - 1)).numpy() for x in (one, other))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    means = ((one.mean(0) - other.mean(0)) ** 2).sum()
    return float(means + (a**2).sum() + (b**2).sum() - 2 * nuclear)


vectors = hnp.arrays(np.float64, 5, elements=st.floats(0.01, 10))


@settings(deadline=None)
@given(vectors, vectors, vectors, vectors)
def test_diagonal_gaussians(mean: Tensor, other_mean: Tensor, scale: Tensor, other_scale: Tensor) -> None:
    one, other = (
        Gaussian(100, torch.from_numpy(m), torch.from_numpy(s).square().diag())
        for m, s in ((mean, scale), (other_mean, other_scale))
    )
    expected = ((mean - other_mean) ** 2).sum() + ((scale - other_scale) ** 2).sum()
    assert distance(one, other) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_dimension_by_hand() -> None:
    one = Gaussian(9, torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    other = Gaussian(9, torch.tensor([4.0]).double(), torch.tensor([[25.0]]).double())
    assert distance(one, other) == pytest.approx(3**2 + 3**2, rel=1e-14)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 12), st.integers(2, 30), st.integers(2, 30))
def test_exact_symmetric_and_zero_at_home(seed: int, dimension: int, count: int, other_count: int) -> None:
    one, other = features_of(count, dimension, seed), features_of(other_count, dimension, seed + 1)
    rounding = 1e-9 * float(one.square().sum(1).max() + other.square().sum(1).max())
    found = distance(gaussian_of(one), gaussian_of(other))
    assert found == pytest.approx(exact_distance(one, other), rel=1e-9, abs=rounding)
    assert found == pytest.approx(distance(gaussian_of(other), gaussian_of(one)), rel=1e-9, abs=rounding)
    assert 0 <= distance(gaussian_of(one), gaussian_of(one)) <= rounding


@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize(("count", "other_count"), [(40, 60), (40, 900), (900, 40)])
def test_fewer_samples_than_dimensions(count: int, other_count: int, offset: float) -> None:
    one, other = (features_of(n, 200, i, decades=2) + offset for i, n in enumerate((count, other_count)))
    found = distance(gaussian_of(one), gaussian_of(other))
    assert found == pytest.approx(exact_distance(one, other), rel=1e-9)


def test_small_variances_count_as_much_as_they_should() -> None:
    one, other = features_of(400, 80, 1, decades=4), features_of(400, 80, 2, decades=4)
    assert distance(gaussian_of(one), gaussian_of(other)) == pytest.approx(exact_distance(one, other), rel=1e-8)


def test_dead_features_change_nothing() -> None:
    one, other = features_of(300, 60, 1), features_of(300, 60, 2)
    expected = distance(gaussian_of(one), gaussian_of(other))
    for features in (one, other):
        features[:, ::4] = 0
    alive = [x[:, [i for i in range(60) if i % 4]] for x in (one, other)]
    found = distance(gaussian_of(one), gaussian_of(other))
    assert found == pytest.approx(distance(gaussian_of(alive[0]), gaussian_of(alive[1])), rel=1e-12)
    assert found < expected


@pytest.mark.parametrize(("count", "dimension"), [(500, 30), (500, 700), (20, 30)])
def test_factor_is_triangular_and_squares_to_the_covariance(count: int, dimension: int) -> None:
    covariance = gaussian_of(features_of(count, dimension, 3)).covariance
    factor = triangular_factor(covariance)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dimension", [64, 600])
def test_equal_to_torch_fidelity_and_torchmetrics(dimension: int) -> None:
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    torchmetrics_fid = pytest.importorskip("torchmetrics.image.fid")
    one, other = features_of(1500, dimension, 1, decades=1.5), features_of(1500, dimension, 2, decades=1.5)
    a, b = gaussian_of(one), gaussian_of(other)
    statistics = [metric_fid.fid_features_to_statistics(x) for x in (one, other)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distance(a, b) == pytest.approx(theirs, rel=1e-8)
    also = float(torchmetrics_fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert distance(a, b) == pytest.approx(also, rel=1e-8)


def test_metric_is_the_distance_of_its_moments() -> None:
    one, other = features_of(200, 8, 1), features_of(150, 8, 2)
    reference = make_reference(gaussian_of(one))
    metric = FrechetDistanceToReference(reference)
    for batch in other.split(40):
        metric.update(batch)
    assert float(metric.compute()) == pytest.approx(float(frechet_distance(reference, gaussian_of(other))), rel=1e-12)
    metric.reset()
    metric.update(one)
    assert float(metric.compute()) < 1e-12
    assert not metric.state_dict()
