"""Runs that go wrong, or are done early, say so at the same step whether they were interrupted or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import Job
from tests.runs import differing, recipe, rows, status, tensors


def warnings_in(log: Path) -> list[str]:
    return [line.partition("step ")[2] for line in log.read_text().splitlines() if "saturation: " in line]


def test_saturation_is_warned_of_once_also_across_a_resume(tmp_path: Path, digits: Path) -> None:
    """A minimax generator that stands still, against a discriminator that learns fast."""
    config = str(
        recipe(
            tmp_path, digits,
            generator={"optimizer": {"learning_rate": 1e-9}},
            discriminator={"width": 8, "optimizer": {"learning_rate": 1e-2}},
            objective={"adversarial": "minimax", "r1": None},
            training={"steps": 60, "critic_steps": 1},
            checkpoint={"every": 20},
        )
    )  # fmt: skip
    whole, parts = tmp_path / "whole.log", tmp_path / "parts.log"
    assert Job(1, ["train", config, f"run_dir={tmp_path / 'whole'}"], log=whole).wait() == [0]
    (warning,) = warnings_in(whole)
    step = int(warning.partition(":")[0])
    assert 3 < step < 57
    assert "objective.adversarial=non_saturating" in warning
    row = next(row for row in rows(tmp_path / "whole") if row["step"] == step)
    assert row["discriminator/real_probability"] > 0.99 > 0.01 > row["discriminator/fake_probability"]
    for steps in (step - 1, step + 1, 60):
        assert Job(1, ["train", config, f"training.steps={steps}"], log=parts).wait() == [0]
    assert warnings_in(parts) == [warning]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_flat_estimate_ends_the_run(tmp_path: Path, digits: Path, world_size: int) -> None:
    """A critic and a generator that stand still; its level is that of the first row, of step 3."""
    still = {"optimizer": {"name": "rmsprop", "learning_rate": 1e-12}}
    config = str(
        recipe(
            tmp_path, digits, generator=still, discriminator=still,
            objective={"adversarial": "wasserstein", "r1": None, "weight_clipping": {"limit": 10}},
            training={"steps": 30, "early_stopping": {"steps": 9, "tolerance": 0.9}},
        )
    )  # fmt: skip
    assert Job(world_size, ["train", config, f"run_dir={tmp_path / 'whole'}"]).wait() == [0] * world_size
    said = status(tmp_path / "whole")
    assert (said["outcome"], said["step"]) == ("finished", 12)
    assert "since step 3 (training.early_stopping)" in said["reason"]
    assert f"step-{said['step']:08d}" in {path.stem for path in (tmp_path / "whole" / "samples").iterdir()}
    assert Job(world_size, ["train", config, "training.steps=7"]).wait() == [0] * world_size
    assert status(tmp_path / "run")["reason"] is None
    for _ in range(2):  # a run that is done stays so
        assert Job(world_size, ["train", config]).wait() == [0] * world_size
        assert status(tmp_path / "run")["step"] == 12
        assert status(tmp_path / "run")["reason"] == said["reason"]
    assert differing(tensors(tmp_path / "run", 12), tensors(tmp_path / "whole", 12)) == []
    assert Job(world_size, ["train", config, "training={steps: 14, batch_size: 16, critic_steps: 2}"]).wait()[0] == 0
    assert status(tmp_path / "run")["step"] == 14
