"""What a run may change when it is continued, and what it is told otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distgan
from distgan.errors import UserError
from tests.runs import recipe

Train = Callable[..., str]


@pytest.fixture
def train(tmp_path: Path, digits: Path) -> Train:
    """Trains a small run on from where it is, with overrides and what `distgan.train` takes."""
    config = recipe(tmp_path, digits, objective={"r1": None}, training={"critic_steps": 1, "steps": 2})
    return lambda *overrides, **options: distgan.train(distgan.load_config(config, overrides), **options)


def state(folder: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((folder / "run" / "checkpoints" / f"step-{step:08d}" / "state.json").read_text()))


def test_a_batch_that_was_accepted_once_stays_so(tmp_path: Path, train: Train) -> None:
    train()
    with pytest.raises(UserError, match="--accept batch"):
        train("training.batch_size=8", "training.steps=4")
    train("training.batch_size=8", "training.steps=4", accept=["batch", "statistics"])
    train("training.batch_size=8", "training.steps=6")
    assert state(tmp_path, 2)["accepted"] == []
    assert (state(tmp_path, 6)["accepted"], state(tmp_path, 6)["position"]) == (["batch", "statistics"], 2 * 16 + 4 * 8)


def test_a_reference_batch_keeps_its_size(tmp_path: Path, train: Train) -> None:
    virtual = ["generator.normalisation=virtual", "discriminator.normalisation=none"]
    train(*virtual)
    changed = [*virtual, "training.accumulation=2", "training.steps=4"]
    with pytest.raises(
        UserError, match=r"generator\.reference_size was 16, but is 8 .* set generator\.reference_size=16"
    ):
        train(*changed)
    train(*changed, "generator.reference_size=16")
    assert state(tmp_path, 4)["position"] == 4 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": ""}, "--resume is empty; give auto, never, or the path"),
        ({"accept": ["seed", "seeds"]}, "--accept seeds: accepted are data, seed, batch, statistics"),
    ],
)
def test_what_is_no_way_to_resume(tmp_path: Path, train: Train, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(**options)
    assert not (tmp_path / "run").exists()
