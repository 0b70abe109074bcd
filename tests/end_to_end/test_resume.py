"""Real processes, killed and resumed: the weights at the end are those of the run that was never killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Job
from tests.runs import differing, losses, recipe, status, tensors, wait_for_checkpoint

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def evaluation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Evaluations in the middle of training must not disturb it; the detector is trained once for all runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_recipe(folder: Path, shards: Path, **sections: Any) -> Path:
    return recipe(folder, shards, evaluation={"every": 5, "num_samples": 64}, **sections)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[int, Path]:
    """The run folders of uninterrupted runs by world size."""
    runs = {}
    for world_size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"undisturbed-{world_size}")
        assert Job(world_size, ["train", str(make_recipe(folder, digits))]).wait() == [0] * world_size
        assert status(folder / "run")["outcome"] == "finished"
        runs[world_size] = folder / "run"
    return runs


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_killed_runs_end_bitwise_the_same(
    tmp_path: Path, digits: Path, undisturbed: dict[int, Path], world_size: int
) -> None:
    config = make_recipe(tmp_path, digits, data={"num_workers": 1 if world_size == 2 else 0})
    chance = random.Random(world_size)
    for after in (2, 6):
        job = Job(world_size, ["train", str(config)])
        wait_for_checkpoint(tmp_path / "run", after, job)
        time.sleep(chance.uniform(0, 0.1))
        # One rank only: its peers must notice and end by themselves.
        job.kill(chance.randrange(world_size))
    assert Job(world_size, ["train", str(config)]).wait() == [0] * world_size
    expected, found = tensors(undisturbed[world_size], STEPS), tensors(tmp_path / "run", STEPS)
    assert differing(found, expected) == []
    assert losses(tmp_path / "run").keys() == {0, 3, 5, 6, 9, 10, 12}
    for step, values in losses(undisturbed[world_size]).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(values, rel=1e-12, abs=1e-15)


def test_stopped_in_the_middle_of_an_epoch_and_resumed(
    tmp_path: Path, digits: Path, undisturbed: dict[int, Path]
) -> None:
    config = make_recipe(tmp_path, digits)
    job = Job(2, ["train", str(config)])
    wait_for_checkpoint(tmp_path / "run", 2, job)
    job.signal(signal.SIGTERM)
    assert job.wait() == [0, 0]
    assert status(tmp_path / "run")["outcome"] == "preempted"
    assert 2 <= status(tmp_path / "run")["step"] < STEPS
    assert Job(2, ["train", str(config)]).wait() == [0, 0]
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed[2], STEPS)) == []


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_colour_and_channels_last_resume_bitwise(tmp_path: Path, digits: Path, world_size: int) -> None:
    """Moments lie in memory as their weights do, which a checkpoint does not say."""
    config = str(make_recipe(tmp_path, digits, data={"channels": 3}))
    changes = ["training.channels_last=true", "training.mixed_precision=bf16", "training.steps=6"]
    assert Job(world_size, ["train", config, *changes, f"run_dir={tmp_path / 'whole'}"]).wait() == [0] * world_size
    for steps in ("2", "6"):
        arguments = ["train", config, *changes[:2], f"training.steps={steps}", f"run_dir={tmp_path / 'parts'}"]
        assert Job(world_size, arguments).wait() == [0] * world_size
    assert differing(tensors(tmp_path / "parts", 6), tensors(tmp_path / "whole", 6)) == []


def test_the_last_step_is_logged_and_changes_nothing_of_a_longer_run(
    tmp_path: Path, digits: Path, undisturbed: dict[int, Path]
) -> None:
    config, log = make_recipe(tmp_path, digits), tmp_path / "log"
    # Rows are due at steps 3, 6, 9, 12.
    assert Job(2, ["train", str(config), "training.steps=4"], log=log).wait() == [0, 0]
    first = losses(tmp_path / "run")
    assert first.keys() == {0, 3, 4}
    assert {"loss/generator", "loss/discriminator"} <= first[4].keys()
    assert "step 4/4" in log.read_text()
    assert Job(2, ["train", str(config)]).wait() == [0, 0]
    found, expected = losses(tmp_path / "run"), losses(undisturbed[2])
    assert found.keys() == expected.keys() | {4}
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-12, abs=1e-15)
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed[2], STEPS)) == []


def test_a_run_shorter_than_its_logging_interval_has_its_last_row(tmp_path: Path, digits: Path) -> None:
    config, log = recipe(tmp_path, digits, training={"steps": 2}, monitoring={"every": 50}), tmp_path / "log"
    assert Job(1, ["train", str(config)], log=log).wait() == [0]
    [row] = [values for step, values in losses(tmp_path / "run").items() if step == 2]
    assert {"loss/generator", "loss/discriminator"} <= row.keys()
    assert "step 2/2" in log.read_text()


def test_without_a_valid_checkpoint_nothing_is_thrown_away(
    tmp_path: Path, digits: Path, undisturbed: dict[int, Path]
) -> None:
    config = make_recipe(tmp_path, digits)
    shutil.copytree(undisturbed[1], tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    log = tmp_path / "log"
    assert Job(1, ["train", str(config)], log=log).wait() == [2]
    assert "none of the checkpoints there is valid" in log.read_text()
    assert losses(tmp_path / "run") == losses(undisturbed[1])


def test_resume_from_a_checkpoint_of_another_run(tmp_path: Path, digits: Path, undisturbed: dict[int, Path]) -> None:
    config = make_recipe(tmp_path, digits)
    source = undisturbed[1] / "checkpoints" / "step-00000006"
    assert Job(1, ["train", str(config), "--resume", str(source)]).wait() == [0]
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed[1], STEPS)) == []


def test_losses_do_not_depend_on_the_ranks(undisturbed: dict[int, Path]) -> None:
    alone = losses(undisturbed[1])
    for world_size in (2, 4):
        for step, values in losses(undisturbed[world_size]).items():
            # float32, and differences grow with the steps.
            assert values == pytest.approx(alone[step], rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_resume_on_another_world_size(
    tmp_path: Path, digits: Path, undisturbed: dict[int, Path], before: int, after: int
) -> None:
    config = make_recipe(tmp_path, digits)
    Job(before, ["train", str(config), "training.steps=6"]).wait()
    assert status(tmp_path / "run")["step"] == 6
    assert Job(after, ["train", str(config)]).wait() == [0] * after
    for step, values in losses(undisturbed[before]).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(values, rel=2e-3, abs=1e-4)


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, digits: Path, undisturbed: dict[int, Path]
) -> None:
    config = make_recipe(tmp_path, digits)
    shutil.copytree(undisturbed[1], tmp_path / "run")
    for step in (10, 12):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        os.truncate(checkpoint / "generator.1-of-1.safetensors", 1000)
    log = tmp_path / "log"
    assert Job(1, ["train", str(config)], log=log).wait() == [0]
    assert "step-00000010" in log.read_text()
    assert "resuming from" in log.read_text()
    assert "step-00000008" in log.read_text()
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed[1], STEPS)) == []


def test_starting_over_loses_nothing(tmp_path: Path, digits: Path, undisturbed: dict[int, Path]) -> None:
    config = make_recipe(tmp_path, digits)
    shutil.copytree(undisturbed[1], tmp_path / "run")
    assert Job(1, ["train", str(config), "--resume", "never", "training.steps=2"]).wait() == [0]
    assert differing(tensors(tmp_path / "run" / "previous-1", STEPS), tensors(undisturbed[1], STEPS)) == []
    assert not (tmp_path / "run" / "checkpoints" / "step-00000012").exists()
