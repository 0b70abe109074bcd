"""The Inception score against closed forms, its definition, and torch-fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distgan.errors import UserError
from distgan.evaluation.metrics.inception_score import InceptionScoreOfLogits, Score


def score_of(logits: Tensor, splits: int = 10, order: Tensor | None = None) -> Score:
    metric = InceptionScoreOfLogits(logits.shape[1], len(logits), splits)
    for numbers in (torch.arange(len(logits)) if order is None else order).split(7):
        metric.update(logits[numbers], numbers)
    return metric.compute()


def test_nothing_told_apart_is_one() -> None:
    assert [float(value) for value in score_of(torch.zeros(30, 5))] == pytest.approx([1, 0], abs=1e-12)


@pytest.mark.parametrize("classes", [2, 7])
def test_sure_and_even_over_k_classes_is_k(classes: int) -> None:
    logits = torch.full((10 * classes, 9), -1e4).double()
    logits[torch.arange(10 * classes), torch.arange(10 * classes) % classes] = 1e4
    assert [float(value) for value in score_of(logits)] == pytest.approx([classes, 0], abs=1e-12)
    assert float(score_of(logits, splits=1).mean) == pytest.approx(classes)


def test_two_splits_by_hand() -> None:
    """The first sees classes 0 and 1, surely; the second class 0 only: scores 2 and 1."""
    logits = torch.tensor([[1e4, 0], [0, 1e4], [1e4, 0], [1e4, 0]])
    assert [float(value) for value in score_of(logits, splits=2)] == pytest.approx([1.5, 0.5])


@settings(deadline=None, max_examples=30)
@given(st.integers(10, 60), st.integers(2, 6), st.integers(1, 10), st.integers(0, 99))
def test_the_definition_whatever_the_order(samples: int, classes: int, splits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    p = logits.double().softmax(1).numpy()
    scores = []
    for part in (p[s * samples // splits : (s + 1) * samples // splits] for s in range(splits)):
        divergences = [sum(y * math.log(y / mean) for y, mean in zip(row, part.mean(0), strict=True)) for row in part]
        scores.append(math.exp(sum(divergences) / len(divergences)))
    found = score_of(logits, splits, torch.randperm(samples, generator=generator))
    assert float(found.mean) == pytest.approx(np.mean(scores), rel=1e-10)
    assert float(found.deviation) == pytest.approx(np.std(scores), rel=1e-6, abs=1e-10)
    assert 1 - 1e-12 <= float(found.mean) <= classes + 1e-9


def test_equal_to_torch_fidelity_when_it_does_not_shuffle() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 4 * torch.randn(1003, 50, generator=torch.Generator().manual_seed(3))
    expected = theirs.isc_features_to_metric(logits, splits=10, shuffle=False)
    found = score_of(logits)
    assert float(found.mean) == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert float(found.deviation) == pytest.approx(expected["inception_score_std"], rel=1e-9)
    shuffled = logits[np.random.RandomState(2020).permutation(len(logits))]
    expected = theirs.isc_features_to_metric(logits)
    assert float(score_of(shuffled).mean) == pytest.approx(expected["inception_score_mean"], rel=1e-12)


def test_needs_a_sample_a_split() -> None:
    with pytest.raises(UserError, match="num_samples = 9"):
        InceptionScoreOfLogits(3, 9)
