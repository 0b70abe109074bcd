"""What a run may change when it is continued, and what it is told otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distgan
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.errors import UserError
from distgan.runs.status import read_status, standing
from tests.checkpoints import rewrite
from tests.runs import recipe
from tests.shards import build_index

Train = Callable[..., str]


@pytest.fixture
def train(tmp_path: Path, digits: Path) -> Train:
    """Trains a small run on from where it is, with overrides and what `distgan.train` takes."""
    config = recipe(tmp_path, digits, objective={"r1": None}, training={"critic_steps": 1, "steps": 2})
    return lambda *overrides, **options: distgan.train(distgan.load_config(config, overrides), **options)


def state(folder: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((folder / "run" / "checkpoints" / f"step-{step:08d}" / "state.json").read_text()))


def substitute(folder: Path, step: int, sample: int) -> None:
    """Have a checkpoint say that a sample could not be read."""
    changed = state(folder, step) | {"substitutions": [[sample, 0, 5, "damaged"]]}
    rewrite(folder / "run" / "checkpoints" / f"step-{step:08d}", "state.json", json.dumps(changed).encode())


def test_a_batch_that_was_accepted_once_stays_so(tmp_path: Path, train: Train) -> None:
    train()
    with pytest.raises(UserError, match="--accept batch"):
        train("training.batch_size=8", "training.steps=4")
    train("training.batch_size=8", "training.steps=4", accept=["batch", "statistics"])
    train("training.batch_size=8", "training.steps=6")
    assert state(tmp_path, 2)["accepted"] == []
    assert (state(tmp_path, 6)["accepted"], state(tmp_path, 6)["position"]) == (["batch", "statistics"], 2 * 16 + 4 * 8)


def test_a_refused_attempt_says_what_the_run_was_before(tmp_path: Path, train: Train) -> None:
    for _ in range(2):
        with pytest.raises(UserError):
            train("data.path=/nowhere")
        assert read_status(tmp_path / "run").earlier is None, "it never trained"  # type: ignore[union-attr]
    train()
    for attempt in range(2):
        with pytest.raises(UserError, match="--accept batch"):
            train("training.batch_size=8", "training.steps=4")
        told = str(standing(tmp_path / "run"))
        assert told.startswith(f"failed 2 {tmp_path}/run/checkpoints/step-00000002: training.batch_size: ")
        assert told.endswith("; before this attempt the run was finished at step 2"), attempt
    train("training.steps=4")
    assert str(standing(tmp_path / "run")) == "finished 4"


def test_a_reference_batch_keeps_its_size(tmp_path: Path, train: Train) -> None:
    virtual = ["generator.normalization=virtual", "discriminator.normalization=none"]
    train(*virtual)
    changed = [*virtual, "training.gradient_accumulation_steps=2", "training.steps=4"]
    with pytest.raises(UserError, match=r"generator\.reference_size .*\b16\b.*\b8\b.*generator\.reference_size=16"):
        train(*changed)
    train(*changed, "generator.reference_size=16")
    assert state(tmp_path, 4)["position"] == 4 * 16


def test_samples_that_were_replaced_are_of_the_data_that_they_were_in(
    tmp_path: Path, digits: Path, train: Train
) -> None:
    train()
    samples = len(load_index(str(digits)))
    substitute(tmp_path, 2, samples - 1)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    shutil.copy(sorted(digits.glob("*.tar"))[0], fewer)
    save_index(build_index(str(fewer)), fewer)
    train(f"data.path={fewer}", "training.steps=4", accept=["data"])
    assert state(tmp_path, 4)["substitutions"] == []
    train("training.steps=6", accept=["data"])
    substitute(tmp_path, 6, 7)
    train("training.steps=8")
    assert state(tmp_path, 8)["substitutions"] == [[7, 0, 5, "damaged"]]


@pytest.mark.parametrize("resume", ["never", "runs/x"])
def test_a_launcher_that_restarts_does_not_start_over_each_time(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match=f"--resume {resume}: .*--max-restarts 0"):
        train(resume=resume)
    assert train().outcome == "finished"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": ""}, "--resume: empty.*auto, never"),
        ({"accept": ["seed", "seeds"]}, "--accept seeds: .*data, seed, batch, statistics"),
    ],
)
def test_what_is_no_way_to_resume(tmp_path: Path, train: Train, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(**options)
    assert not (tmp_path / "run").exists()
