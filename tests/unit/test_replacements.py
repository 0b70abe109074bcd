"""The record of replaced samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgan.data.replacements import Failure, Substitutions, check_failure_rate
from distgan.errors import UserError


def record(*entries: tuple[int, int, int]) -> Substitutions:
    substitutions = Substitutions()
    for sample, replacement, position in entries:
        assert substitutions.add(Failure(sample, replacement, f"shard:{sample}: broken"), position)
    return substitutions


def applied(substitutions: Substitutions, *pairs: tuple[int, int]) -> list[int]:
    samples, positions = np.array(pairs).T
    return substitutions.apply(samples, positions).tolist()


def test_a_replacement_holds_from_its_position_on() -> None:
    assert applied(record((5, 9, 100)), (5, 99), (5, 100), (5, 10**9), (9, 100), (6, 100)) == [5, 9, 9, 9, 6]


def test_a_replacement_may_be_replaced() -> None:
    chain = record((5, 9, 100), (9, 2, 200))
    assert applied(chain, (5, 100), (5, 199), (5, 200), (9, 199), (9, 200)) == [9, 9, 2, 9, 2]


def test_the_first_of_two_replacements_stays() -> None:
    substitutions = record((5, 9, 100))
    assert not substitutions.add(Failure(5, 8, ""), 50)
    assert applied(substitutions, (5, 70), (5, 100)) == [5, 9]
    assert len(substitutions) == 1
    assert 5 in substitutions
    assert 9 not in substitutions


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 30)), max_size=30))
def test_replacements_never_lead_in_circles(entries: list[tuple[int, int, int]]) -> None:
    substitutions = Substitutions()
    for sample, replacement, position in entries:
        substitutions.add(Failure(sample, replacement, ""), position)
    final = substitutions.apply(np.arange(9), np.full(9, 30))  # ends at all
    assert all(sample not in substitutions for sample in final.tolist())
    assert Substitutions.from_json(json.loads(json.dumps(substitutions.to_json())), 9) == substitutions


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        "text",
        [1],
        [[1, 2, 3]],
        [[1, 2, 3, "x", 4]],
        [[1, 2, "3", "x"]],
        [[-1, 2, 3, "x"]],
        [[1, 2, -3, "x"]],
        [[True, 2, 3, "x"]],
        [[1, 1, 0, "x"]],
        [[1, 2, 0, "x"], [1, 3, 0, "x"]],
        [[1, 2, 0, "x"], [2, 1, 0, "x"]],
        [[1, 10, 0, "x"]],
    ],
)
def test_a_damaged_record_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="replaced samples"):
        Substitutions.from_json(value, 10)


def test_failure_rate() -> None:
    """N = 50,000 at 1 %: up to 100 of the first 10,000 (or fewer) seen, 200 of 20,000, and 500 in all."""
    for position, allowed in ((0, 100), (9_999, 100), (20_000, 200), (50_000, 500), (10**9, 500)):
        check_failure_rate(record(*((i, 40_000, 0) for i in range(allowed))), position, 50_000, 0.01)
        with pytest.raises(UserError) as error:
            check_failure_rate(record(*((i, 40_000, 0) for i in range(allowed + 1))), position, 50_000, 0.01)
        assert str(error.value).count("broken") == 5
        assert "shard:0: broken" in str(error.value)
        assert "\n" not in str(error.value)
    check_failure_rate(Substitutions(), 10, 10, 0.0)
    with pytest.raises(UserError):
        check_failure_rate(record((1, 2, 0)), 10, 10, 0.0)
    check_failure_rate(record(*((i, 90, 0) for i in range(5))), 10**6, 100, 0.05)
