"""When the evaluations of a run say that it has diverged for good."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import DivergenceConfig, parse_config
from distgan.errors import UserError
from distgan.monitoring.divergence import Divergence, is_far_worse, observe, why_diverged
from tests.configs import MINIMAL

GUARD = DivergenceConfig(action="stop")


def after(values: list[float], *, higher: bool = False, guard: DivergenceConfig = GUARD) -> list[bool]:
    """Whether a run has diverged for good after each evaluation."""
    found, best, diverged = Divergence(), None, []
    for step, value in enumerate(values):
        if math.isfinite(value) and (best is None or (value > best if higher else value < best)):
            best = value
        found = observe(found, step, "m", value, best, higher=higher, factor=guard.factor)
        diverged.append(why_diverged(found, guard, best) is not None)
    return diverged


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([400, 30, 12, 61, 150, 240], [False] * 5 + [True]),  # a collapse
        ([400, 30, 12, 61, 150, 30, 61, 61], [False] * 8),  # one good evaluation between bad ones
        ([400, 30, 12, 23.9, 23.9, 23.9], [False] * 6),  # less than twice the best
        ([400, 30, 12, 31, 31, 31], [False] * 6),  # 2.6 times the best, but 4.9 % of the gain
        ([400, 30, 12, 32, 32, 32], [False] * 5 + [True]),  # 5.2 % of the gain
        ([math.nan, math.inf, math.nan], [False, False, True]),
        ([400, 30, 12, math.nan, 61, math.inf], [False] * 5 + [True]),
        # KID near 0, and below, where unbiased estimates lie: noise, then a collapse.
        ([0.3, 0.001, -0.0005, 0.003, 0.004, 0.003], [False] * 6),
        ([0.3, 0.001, -0.0005, 0.05, 0.1, 0.2], [False] * 5 + [True]),
    ],
)
def test_a_metric_that_falls(values: list[float], expected: list[bool]) -> None:
    assert after(values) == expected


def test_a_metric_that_grows() -> None:
    assert after([1.0, 6.0, 8.0, 4.1, 4.1, 4.1], higher=True) == [False] * 6
    assert after([1.0, 6.0, 8.0, 3.9, 3.9, 3.9], higher=True) == [False] * 5 + [True]
    assert after([0.0, 25, 12, 12], higher=True, guard=GUARD.model_copy(update={"patience": 2}))[-1]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(1.001, 1e3), st.booleans())
def test_no_better_value_is_worse(value: float, best: float, first: float, factor: float, higher: bool) -> None:
    if value >= best if higher else value <= best:
        assert not is_far_worse(value, best, first, higher=higher, factor=factor)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.sampled_from([2.0**-20, 8.0, 2.0**30]))
def test_the_unit_of_a_metric_does_not_matter(value: float, best: float, first: float, unit: float) -> None:
    plain = is_far_worse(value, best, first, higher=False, factor=2.0)
    assert plain == is_far_worse(value * unit, best * unit, first * unit, higher=False, factor=2.0)


def test_an_evaluation_that_is_repeated_counts_once_and_another_metric_starts_anew() -> None:
    found = Divergence()
    for step in (0, 1, 2, 2, 2):
        found = observe(found, step, "m", 1.0 if step == 0 else 9.0, 1.0, higher=False, factor=2.0)
    assert found.worse == 2
    assert observe(found, 3, "n", 9.0, 9.0, higher=False, factor=2.0).worse == 0


def test_the_reason_names_the_values() -> None:
    found = Divergence(metric="fid[inception]", first=400, last=95.2, step=3000, worse=3)
    assert why_diverged(found, GUARD, 12.3) == (
        "fid[inception] diverged: 95.2 at step 3000, best 12.3; worse by a factor of 2 in 3 evaluations in a row"
    )


def test_the_key_is_an_action_or_a_section() -> None:
    def guard(value: object, every: int = 5) -> DivergenceConfig | None:
        sections = {"training": {**MINIMAL["training"], "on_divergence": value}, "evaluation": {"every": every}}
        return parse_config({**MINIMAL, **sections}, source="x").training.on_divergence

    assert guard(None) is None
    assert guard("stop", every=0) == GUARD
    assert guard({"action": "rollback", "max_rollbacks": 1}) == DivergenceConfig(action="rollback", max_rollbacks=1)
    for value, every, said in (
        ("rollback", 0, r"training.on_divergence: rollback needs .* evaluation.every"),
        ("restart", 5, r"training.on_divergence.*stop.*rollback"),
        ({"action": "stop", "max_rollbacks": 1}, 5, r"max_rollbacks: has no effect with action: stop"),
        ({"action": "stop", "factor": 1}, 5, r"training.on_divergence.factor"),
    ):
        with pytest.raises(UserError, match=said):
            guard(value, every)
