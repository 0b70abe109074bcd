"""A run that is asked to stop in any part of an evaluation leaves at once, and makes it up when it is resumed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distgan.inference.evaluate import evaluate
from tests.ranks import Job
from tests.runs import differing, recipe, rows, status, tensors

FID = "fid[classifier]"


def stopped_at(job: Job, log: Path, words: str) -> None:
    """SIGUSR1 to the last rank alone once the log says so; all ranks then leave, the run preempted."""
    deadline = time.monotonic() + 120
    while words not in log.read_text():
        assert job.running(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    last = job.processes[-1].pid
    assert last is not None
    os.kill(last, signal.SIGUSR1)
    assert set(job.wait(60)) == {0}, log.read_text()


def test_stopped_in_each_part_of_an_evaluation(tmp_path: Path, digits: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    number = 0

    def start(world_size: int, steps: int, folder: Path = run, **evaluation: Any) -> tuple[Job, Path]:
        nonlocal number
        number += 1
        settings = {"every": 4, "num_samples": 40, "cache_dir": str(cache), **evaluation}
        training = {"steps": steps, "batch_size": 16}
        config = recipe(tmp_path, digits, run_dir=str(folder), training=training, evaluation=settings)
        log = tmp_path / f"log {number}"
        log.touch()
        return Job(world_size, ["train", str(config)], log=log), log

    def check_left(step: int) -> None:
        assert (status(run)["outcome"], status(run)["step"], status(run)["reason"]) == ("preempted", step, "SIGUSR1")
        assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"

    job, log = start(2, 8, batch_size=1)
    stopped_at(job, log, "training the classifier")
    check_left(0)
    assert not list(cache.rglob("classifier-*"))
    job, log = start(2, 8, batch_size=1)
    stopped_at(job, log, "computing the statistics")
    check_left(0)
    assert list(cache.rglob("classifier-*"))
    assert not list(cache.rglob("real-*"))

    assert start(1, 3)[0].wait() == [0]
    assert status(run)["outcome"] == "finished"
    assert [row["step"] for row in rows(run) if FID in row] == [0]
    job, log = start(1, 8, num_samples=10**7)
    stopped_at(job, log, "step 4: evaluating")
    check_left(4)
    assert [row["step"] for row in rows(run)] == [0, 3]

    assert start(1, 8)[0].wait() == [0]
    assert status(run)["outcome"] == "finished"
    found = {row["step"]: row[FID] for row in rows(run) if FID in row}
    assert list(found) == [0, 4, 8]
    assert [row["step"] for row in rows(run)] == [0, 3, 4, 6, 8]
    job, _ = start(1, 8, tmp_path / "straight")
    assert job.wait() == [0]
    straight = {row["step"]: row[FID] for row in rows(tmp_path / "straight") if FID in row}
    assert found == pytest.approx(straight, rel=1e-12)
    assert not differing(tensors(run, 8), tensors(tmp_path / "straight", 8))
    assert evaluate(run / "checkpoints" / "step-00000004")[FID] == pytest.approx(found[4], rel=1e-6)
