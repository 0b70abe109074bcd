"""Means of what players report, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from distgan.distributed.runtime import Runtime
from distgan.players.accumulator import ScalarAccumulator

ONE, ZERO = torch.ones(()), torch.zeros(())


def test_each_value_is_averaged_over_the_updates_that_report_it_and_were_applied() -> None:
    statistics, runtime = ScalarAccumulator(), Runtime()
    for loss, applied in ((1.0, ONE), (4.0, ONE), (math.nan, ZERO)):
        statistics.add({"loss": torch.tensor(loss)}, applied)
    statistics.add({"loss": torch.tensor(7.0), "penalty": torch.tensor(10.0)}, ONE)
    assert statistics.reduce(runtime) == {"loss": 4.0, "penalty": 10.0}
    assert statistics.reduce(runtime) == {}


def test_an_interval_goes_on_from_its_totals_to_the_same_bits() -> None:
    """In float64 (0.1 + 0.2) + 0.3 is not 0.1 + (0.2 + 0.3): the sum must be cut where the checkpoint was."""
    first, second, runtime = ScalarAccumulator(), ScalarAccumulator(), Runtime()
    first.add({"loss": torch.tensor(0.1, dtype=torch.float64)}, ONE)
    second.carry(first.totals(runtime))
    for statistics in (first, second):
        for loss in (0.2, 0.3):
            statistics.add({"loss": torch.tensor(loss, dtype=torch.float64)}, ONE)
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
    found = first.reduce(runtime)
    assert found == second.reduce(runtime)
    assert found == {"loss": pytest.approx(0.2)}


def test_infinite_values_of_applied_updates_have_a_finite_mean() -> None:
    statistics = ScalarAccumulator()
    for _ in range(3):
        statistics.add({"logit": torch.tensor(math.inf)}, ONE)
    assert math.isfinite(statistics.reduce(Runtime())["logit"])
