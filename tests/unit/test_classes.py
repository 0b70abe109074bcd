"""The spread over classes, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distgan.evaluation.metrics.class_coverage import ClassSpread, Spread


def spread_of(class_counts: list[int], classes: Tensor) -> Spread:
    metric = ClassSpread(torch.tensor(class_counts))
    for part in classes.split(30):
        metric.update(F.one_hot(part, len(class_counts)).float())
    return metric.compute()


def test_as_frequent_as_in_the_data() -> None:
    found = spread_of([10, 20, 30], torch.arange(60) // 10 // 2)
    uneven = spread_of([10, 20, 30], torch.tensor([0, 1, 1, 2, 2, 2]).repeat(10))
    assert int(found.found) == int(uneven.found) == 3
    assert float(uneven.kl) == pytest.approx(0, abs=1e-15)
    assert float(found.kl) == pytest.approx(sum(math.log(share) / 3 for share in (2, 1, 2 / 3)))
    assert float(uneven.smallest_share) == pytest.approx(1 / 6)


def test_a_class_is_found_from_a_tenth_of_its_share_on() -> None:
    """Four equal classes: a share of 0.025 counts, 0.024 does not."""
    classes = torch.tensor([0] * 500 + [1] * 451 + [2] * 25 + [3] * 24)
    found = spread_of([7, 7, 7, 7], classes)
    assert int(found.found) == 3
    assert float(found.smallest_share) == pytest.approx(0.024)


def test_collapse_to_one_of_a_thousand() -> None:
    """KL of a point mass to the uniform distribution is log 1000 nats."""
    found = spread_of([5] * 1000, torch.full((200,), 17))
    assert int(found.found) == 1
    assert float(found.kl) == pytest.approx(math.log(1000))
    assert float(found.smallest_share) == 0


def test_classes_without_data_are_never_chosen() -> None:
    metric = ClassSpread(torch.tensor([4, 0, 4]))
    metric.update(torch.tensor([[1.0, 9.0, 2.0], [3.0, 9.0, 2.0]]))
    found = metric.compute()
    assert int(found.found) == 2
    assert float(found.kl) == pytest.approx(0, abs=1e-15)
