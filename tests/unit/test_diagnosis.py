"""Diagnoses of curves that were made up to have what is to be found in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import EarlyStoppingConfig, parse_config
from distgan.errors import UserError
from distgan.monitoring.diagnosis import Diagnosis, observe, why_stop

EVERY = 50


def healthy(**changes: float) -> dict[str, float]:
    row = {
        "discriminator/real_probability": 0.7,
        "discriminator/fake_probability": 0.3,
        "gradient_norm/generator": 10.0,
        "generator/diversity": 0.4,
        "data/diversity": 0.42,
    }
    return row | {name.replace("__", "/"): value for name, value in changes.items()}


def saturated(gradient: float) -> dict[str, float]:
    return healthy(
        discriminator__real_probability=0.999, discriminator__fake_probability=0.001, gradient_norm__generator=gradient
    )


def warnings_of(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """What is warned of, with the number of the row: `saturation@7`."""
    diagnosis, found = Diagnosis(), []
    for number, row in enumerate(rows, 1):
        diagnosis, warnings = observe(diagnosis, number * EVERY, row, None)
        assert all(warning.startswith(f"step {number * EVERY}: ") for warning in warnings)
        found += [f"{warning.split(': ')[1]}@{number}" for warning in warnings]
    return found


def test_a_healthy_run_is_left_alone() -> None:
    noise = itertools.cycle((0.5, 2.0, 1.0))
    assert warnings_of(healthy(gradient_norm__generator=10 * next(noise)) for _ in range(200)) == []


def test_saturation_is_warned_of_once_an_episode() -> None:
    rows = [healthy()] * 20 + [saturated(0.1)] * 100
    assert warnings_of(rows) == ["saturation@21"]
    assert warnings_of([*rows, healthy(), healthy(), saturated(0.2), saturated(0.1)]) == [
        "saturation@21",
        "saturation@123",
    ]


def test_neither_a_certain_discriminator_nor_a_small_gradient_alone_is_saturation() -> None:
    assert warnings_of([healthy()] * 20 + [saturated(10.0)] * 20) == []
    assert warnings_of([healthy()] * 20 + [healthy(gradient_norm__generator=0.01)] * 20) == []
    critic = {"gradient_norm/generator": 5.0, "divergence/wasserstein": 1.0}
    assert warnings_of([critic] * 20 + [critic | {"gradient_norm/generator": 0.001}]) == []


def test_collapse_is_a_fall_below_the_past() -> None:
    rows = [healthy(generator__diversity=0.2)] * 20 + [healthy(generator__diversity=0.05)] * 100
    assert warnings_of(rows) == ["collapse@21"]


def test_a_slow_collapse_is_a_fall_below_the_real_data() -> None:
    """Over ten half-lives of the past, which follows it down: there is no sudden fall."""
    slow = [healthy(generator__diversity=0.4 * 0.99**number) for number in range(200)]
    first = next(number for number, row in enumerate(slow, 1) if row["generator/diversity"] < 0.3 * 0.42)
    assert warnings_of(slow) == [f"collapse@{first}"]


def test_a_run_that_has_not_yet_spread_has_not_collapsed() -> None:
    assert warnings_of(healthy(generator__diversity=0.001 * number) for number in range(1, 300)) == []


def test_what_is_missing_or_not_finite_tells_nothing() -> None:
    assert warnings_of([healthy()] * 5 + [{}, {"learning_rate/generator": 1.0}] * 5) == []
    broken = healthy(gradient_norm__generator=math.nan, generator__diversity=math.inf)
    assert warnings_of([healthy()] * 5 + [broken] * 5 + [saturated(0.1)]) == ["saturation@11"]


STOP = EarlyStoppingConfig(steps=1000, tolerance=0.05)


def end_of(values: Iterable[float], *, every: int = EVERY, stop: EarlyStoppingConfig = STOP) -> int | None:
    """The step at which a run with these estimates would end."""
    diagnosis = Diagnosis()
    for number, value in enumerate(values, 1):
        diagnosis, _ = observe(diagnosis, number * every, {"divergence/wasserstein": value}, stop)
        if why_stop(diagnosis, stop):
            return number * every
    return None


def test_a_flat_estimate_ends_the_run_after_that_time() -> None:
    # From the first row, at step 50, on.
    assert end_of([3.0] * 100) == 1050
    assert end_of([3.0] * 200, every=7) == 1008


def test_noise_on_a_flat_estimate_is_averaged_away() -> None:
    noise = itertools.cycle((0.9, 1.1))
    assert end_of(3.0 * next(noise) for _ in range(100)) is not None
    assert end_of((3.0 * (-1) ** number for number in range(100)), stop=STOP) is None


def test_a_falling_or_rising_estimate_goes_on() -> None:
    assert end_of(3.0 * 0.99**number for number in range(400)) is None
    assert end_of(3.0 * 1.01**number for number in range(400)) is None
    # It falls by a tenth in 1000 steps, then not at all: the last level begins within the last steps of the fall.
    falling = [3.0 * 0.9 ** (number / 20) for number in range(60)]
    end = end_of([*falling, *[falling[-1]] * 100])
    assert end is not None
    assert 59 * EVERY < end <= 59 * EVERY + 1000 + 500


def test_the_reason_names_value_and_step() -> None:
    flat = Diagnosis(step=1500, estimate=2.0, level=2.0, since=500)
    assert why_stop(flat, STOP) == (
        "the Wasserstein estimate has been within 5.0% of 2 since step 500 (training.early_stopping)"
    )
    assert why_stop(flat, None) is None
    assert why_stop(flat.model_copy(update={"since": 501}), STOP) is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 29))
def test_a_diagnosis_survives_a_checkpoint(values: list[float], cut: int) -> None:
    def run(through_json_at: int | None) -> tuple[Diagnosis, list[str]]:
        diagnosis, said = Diagnosis(), []
        for number, value in enumerate(values, 1):
            row = {"divergence/wasserstein": value, "generator/diversity": abs(value), "data/diversity": 1.0}
            diagnosis, warnings = observe(diagnosis, number, row, STOP)
            said += warnings
            if number == through_json_at:
                diagnosis = Diagnosis.model_validate_json(diagnosis.model_dump_json())
        return diagnosis, said

    assert run(cut) == run(None)


def test_only_a_wasserstein_run_can_stop_when_it_is_flat() -> None:
    values = {
        "run_dir": "r",
        "data": {"path": "d", "resolution": 32},
        "training": {"steps": 5, "batch_size": 8, "early_stopping": {}},
    }
    with pytest.raises(UserError, match=r"training.early_stopping: non_saturating does not estimate"):
        parse_config(values)
    assert parse_config(values, ["objective={adversarial: wasserstein, weight_clipping: {}}"])
