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
        ema={"half_life_kimg": 0.1}, monitoring={"every": 1},
    )  # fmt: skip
    distgan.train(distgan.load_config(config))
    # Two updates of 16 images, whose half-life is 100; ten more updates were made before and between.
    assert [row["ema/decay"] for row in rows(tmp_path / "run") if row["step"]] == pytest.approx([0.5**0.32] * 4)
    assert rows(tmp_path / "run")[-1]["progress/kimg"] > 4 * 2 * 16 / 1000


def test_schedules_are_written_at_the_images_of_their_row(tmp_path: Path, digits: Path) -> None:
    curve = {"start": 1.0, "end": 0.2, "over": 0.064}
    optimizer = {"learning_rate": {"start": 1e-3, "end": 5e-4}, "betas": [0, curve | {"start": 0.5}]}
    config = recipe(
        tmp_path, digits,
        discriminator={"optimizer": optimizer}, objective={"r1": {"gamma": curve}},
        training={"steps": None, "kimg": 0.1, "critic_steps": 1}, monitoring={"every": 1},
    )  # fmt: skip
    outcome = distgan.train(distgan.load_config(config))
    assert (outcome.outcome, outcome.step) == ("finished", 7), "7 steps of 16 images are the first 100"
    found = {row["images"]: row for row in rows(tmp_path / "run") if row["step"]}
    for images, gamma, beta in ((16, 0.8, 0.425), (32, 0.6, 0.35), (64, 0.2, 0.2), (96, 0.2, 0.2)):
        assert found[images]["schedule/objective.r1.gamma"] == pytest.approx(gamma)
        assert found[images]["schedule/discriminator.optimizer.betas.1"] == pytest.approx(beta)
    # Rates are those of the row's step: 96 images were before the last one, of 112.
    assert found[112]["learning_rate/discriminator"] == pytest.approx(1e-3 - 5e-4 * 96 / 112)
