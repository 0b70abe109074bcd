"""Disks that fill up or turn read-only under a run of two ranks: it goes on, loud, and loses nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from distgan.checkpoint.directory import newest_valid, steps
from tests.disks import Disk, small_disk
from tests.ranks import Job
from tests.runs import differing, recipe, rows, status, tensors, wait_for_rows


def wait_for_words(log: Path, words: str, job: Job) -> None:
    deadline = time.monotonic() + 60
    while words not in log.read_text():
        assert job.running(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("fault", "said"), [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_training_goes_on_and_so_do_checkpoints_when_the_disk_is_well_again(
    tmp_path: Path, digits: Path, fault: str, said: str
) -> None:
    config = recipe(tmp_path, digits, training={"steps": 1_000_000, "batch_size": 16}, checkpoint={"keep": 2})
    run, log = tmp_path / "run", tmp_path / "log"
    # What is open all the time, such as metrics.jsonl, would keep a whole run folder from turning read-only.
    with small_disk(run if fault == "full" else run / "checkpoints", megabytes=8) as disk:
        job = Job(2, ["train", str(config)], log=log)
        wait_for_rows(run, job)
        make_ill, make_well = {"full": (Disk.fill, Disk.empty), "read-only": (Disk.forbid, Disk.allow)}[fault]
        make_ill(disk)
        wait_for_words(log, said, job)
        assert f"training goes on, last good checkpoint: {run}" in log.read_text()
        good = newest_valid(run / "checkpoints")
        assert good is not None
        make_well(disk)
        failed_at = max(steps(run / "checkpoints"))
        while max(steps(run / "checkpoints")) <= failed_at or not rows(run)[-1]["checkpoint/failures"]:
            assert job.running(), log.read_text()
            time.sleep(0.02)
        assert Job(1, ["stop", str(run)]).wait() == [0]
        assert job.wait(60) == [0, 0], log.read_text()
        last = status(run)["step"]
        undisturbed = ["train", str(config), f"training.steps={last}", f"run_dir={tmp_path / 'undisturbed'}"]
        assert Job(2, [*undisturbed, "checkpoint.every=1000000"]).wait() == [0, 0]
        assert differing(tensors(run, last), tensors(tmp_path / "undisturbed", last)) == []
        assert not list((run / "checkpoints").glob("*.tmp"))


def test_a_read_only_folder_is_refused_at_the_start(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits)
    with small_disk(tmp_path / "run", megabytes=1) as disk:
        disk.forbid()
        assert Job(2, ["train", str(config)], log=tmp_path / "log").wait() == [2, 2]
    said = (tmp_path / "log").read_text()
    assert said.count("distgan: error: ") == 1
    assert "cannot write there: Read-only file system: " in said
