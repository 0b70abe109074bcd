"""The average of the generator's weights over a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import distgan
from tests.runs import recipe, rows


def test_a_long_critic_phase_weighs_no_more_than_a_plain_step(tmp_path: Path, digits: Path) -> None:
    extra = {"updates": 5, "first": 1, "every": 2}
    config = recipe(
        tmp_path, digits,
        training={"steps": 4, "initial_critic_steps": 3, "critic_steps": 2, "extra_critic_steps": extra},
        ema={"half_life_kimg": 0.1, "rampup": None}, monitoring={"every": 1},
    )  # fmt: skip
    distgan.train(distgan.load_config(config))
    # Two updates of 16 images, whose half-life is 100; ten more updates were made before and between.
    assert [row["ema/decay"] for row in rows(tmp_path / "run") if row["step"]] == pytest.approx([0.5**0.32] * 4)
    assert rows(tmp_path / "run")[-1]["progress/kimg"] > 4 * 2 * 16 / 1000
