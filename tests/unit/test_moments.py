"""Moments against numpy's mean and covariance of the same samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distgan.errors import UserError
from distgan.evaluation.moments import Gaussian, Moments


def moments_of(features: Tensor, batch_size: int = 7) -> Gaussian:
    moments = Moments(features.shape[1])
    for batch in features.split(batch_size):
        moments.update(batch)
    return moments.compute()


def features_of(count: int, dimension: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator) @ torch.randn(dimension, dimension, generator=generator)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(2, 9), st.integers(1, 50))
def test_equal_to_numpy_however_batched(count: int, dimension: int, batch_size: int) -> None:
    features = features_of(count, dimension, seed=count)
    found = moments_of(features, batch_size)
    expected = features.double().numpy()
    assert found.samples == count
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), atol=1e-11)


def test_more_dimensions_than_a_block() -> None:
    features = features_of(90, 600)
    found = moments_of(features)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-12, atol=1e-9)
    assert torch.equal(found.covariance, found.covariance.T)


def test_far_from_zero_the_covariance_keeps_ten_digits() -> None:
    features = features_of(500, 4).double() + 1000
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(moments_of(features).covariance, expected, rtol=1e-9)


def test_half_precision_features_are_summed_in_double() -> None:
    features = features_of(3000, 2).bfloat16()
    np.testing.assert_allclose(moments_of(features).mean, features.double().numpy().mean(0), rtol=1e-12)


def test_reset_and_forward_follow_torchmetrics() -> None:
    first, second = features_of(10, 3), features_of(12, 3, seed=1)
    moments = Moments(3)
    assert moments(first).samples == 10
    assert moments(second).samples == 12
    assert moments.compute().samples == 22
    moments.reset()
    moments.update(second)
    assert torch.equal(moments.compute().mean, moments_of(second, 12).mean)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(UserError, match="covariance: found 1 samples"):
        moments_of(torch.ones(1, 3))
