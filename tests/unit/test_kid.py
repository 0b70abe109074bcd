"""The kernel distance against torch-fidelity, and its independence of batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distgan.evaluation.divergences import squared_mmd
from distgan.evaluation.metrics import kid
from distgan.evaluation.metrics.kid import (
    Distance,
    KernelDistanceToReference,
    cubic_kernel,
    subset_distance,
)
from distgan.evaluation.numerics.subsets import draw_subsets


def features_of(count: int, dimension: int, seed: int) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) * (1 + 0.1 * seed)


def distance_of(features: Tensor, reals: Tensor, order: Tensor | None = None, batch_size: int = 50) -> Distance:
    metric = KernelDistanceToReference(reals, len(features))
    for numbers in (torch.arange(len(features)) if order is None else order).split(batch_size):
        metric.update(features[numbers], numbers)
    return metric.compute()


def test_the_kernel_by_hand() -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0], [0.0, 0.0]])
    assert cubic_kernel(x, y).tolist() == [[(1 / 2 + 1) ** 3, 1.0]]


def test_equal_to_torch_fidelity_on_its_subsets() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    features, reals = features_of(300, 16, 1).double(), features_of(250, 16, 2).double()
    options: dict[str, Any] = {"kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    expected = theirs.kid_features_to_metric(features, reals, **options)
    draws = np.random.RandomState(2020)
    pairs = [(draws.choice(300, 100, replace=False), draws.choice(250, 100, replace=False)) for _ in range(20)]
    subsets, real_subsets = (torch.tensor(np.array(side)) for side in zip(*pairs, strict=True))
    found = subset_distance(features, reals, subsets, real_subsets)
    assert float(found.mean) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert float(found.deviation) == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-10)


def test_subsets_are_drawn_without_replacement_and_evenly() -> None:
    subsets = draw_subsets(50, 20, "test", kid.SUBSETS)
    assert subsets.shape == (kid.SUBSETS, 20)
    assert all(len(subset.unique()) == 20 for subset in subsets)
    # Each number is in 40 % of the subsets, give or take five standard deviations.
    counts = torch.bincount(subsets.flatten(), minlength=50)
    assert len(counts) == 50
    assert (counts - 0.4 * kid.SUBSETS).abs().max() < 5 * (0.4 * 0.6 * kid.SUBSETS) ** 0.5
    assert not torch.equal(subsets[0], draw_subsets(50, 20, "another", 1)[0])
    assert not torch.equal(subsets, draw_subsets(50, 20, "test", kid.SUBSETS, seed=1))


def test_one_value_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid, "SUBSETS", 5)
    monkeypatch.setattr(kid, "SUBSET_SIZE", 30)
    features, reals = features_of(400, 8, 1), features_of(60, 8, 2)
    metric = KernelDistanceToReference(reals, 400)
    metric.update(features, torch.arange(400))
    assert len(metric.features[0]) == len(metric.subsets.unique()) < 200  # the others are not kept
    found = metric.compute()
    expected = subset_distance(features, reals, metric.subsets, metric.real_subsets)
    assert [float(value) for value in found] == [float(value) for value in expected]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert [float(value) for value in distance_of(features, reals, order, 33)] == [float(value) for value in found]


def test_the_same_distribution_is_near_zero_and_another_is_not() -> None:
    same = distance_of(features_of(500, 8, 0), features_of(500, 8, 10) / 2)
    assert abs(float(same.mean)) < float(same.deviation)
    assert float(distance_of(features_of(500, 8, 0) + 1, features_of(500, 8, 10) / 2).mean) > 1


def test_fewer_samples_than_a_subset_are_halved() -> None:
    assert kid.subset_size(5000, 1000, 1000) == 1000
    assert kid.subset_size(5000, 999, 1000) == 499
    assert KernelDistanceToReference(features_of(60, 4, 1), 40).subsets.shape == (kid.SUBSETS, 20)


def test_only_chosen_reals_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subsets are of all 400 reals; features of others change nothing, and unreadable ones are left out."""
    monkeypatch.setattr(kid, "SUBSETS", 3)
    monkeypatch.setattr(kid, "SUBSET_SIZE", 20)
    features, reals = features_of(100, 8, 1), features_of(400, 8, 2)
    expected = distance_of(features, reals)
    chosen = draw_subsets(400, 20, "kid/real subsets", 3)
    assert len(chosen.unique()) < 61
    for left_out in (torch.tensor([], dtype=torch.int64), chosen[1, :4]):
        numbers = chosen.unique()[~torch.isin(chosen.unique(), left_out)]
        metric = KernelDistanceToReference(reals[numbers], 100, real_numbers=numbers, num_reals=400)
        metric.update(features, torch.arange(100))
        by_hand = [
            squared_mmd(features[mine], reals[theirs[~torch.isin(theirs, left_out)]], cubic_kernel)
            for mine, theirs in zip(metric.subsets, chosen, strict=True)
        ]
        assert float(metric.compute().mean) == pytest.approx(sum(map(float, by_hand)) / 3, rel=1e-12)
        if not len(left_out):
            assert metric.compute() == expected


def test_by_hand_on_a_line() -> None:
    """x = {0, 1}, y = {0, 2}: k(0, 1) + k(0, 2) - mean of (1, 1, 1, 27) * 2 = 1 + 1 - 15."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    assert float(squared_mmd(x, y, cubic_kernel)) == -13


def test_missing_samples_are_noticed() -> None:
    metric = KernelDistanceToReference(features_of(20, 4, 1), 30)
    metric.update(features_of(10, 4, 2), torch.arange(10))
    with pytest.raises(ValueError, match="10 chosen samples, expected"):
        metric.compute()
