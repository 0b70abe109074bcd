"""Ranks that stop, end or come late, with real processes: who waits, for how long, and what is said of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.ranks import Job
from tests.runs import differing, recipe, status, tensors, wait_for_rows

ENDLESS = {"steps": 1_000_000, "batch_size": 16}


def test_a_rank_that_is_stopped_for_a_while_is_waited_for(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training={"steps": 30})
    job = Job(2, ["train", str(config)])
    wait_for_rows(tmp_path / "run", job, 2)
    stopped = job.processes[1].pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(2)
    assert status(tmp_path / "run")["outcome"] == "running"
    os.kill(stopped, signal.SIGCONT)
    assert job.wait() == [0, 0]
    undisturbed = tmp_path / "undisturbed"
    assert Job(2, ["train", str(config), f"run_dir={undisturbed}"]).wait() == [0, 0]
    assert differing(tensors(tmp_path / "run", 30), tensors(undisturbed, 30)) == []


def test_a_rank_that_stays_silent_is_named_when_time_is_up(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training={**ENDLESS, "timeout_minutes": 0.05})
    job = Job(3, ["train", str(config), "training.batch_size=18"], log=tmp_path / "log")
    wait_for_rows(tmp_path / "run", job, 2)
    stopped = job.processes[1].pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    for rank in (0, 2):
        job.processes[rank].join(60)
        assert job.processes[rank].exitcode == 1
    os.kill(stopped, signal.SIGKILL)
    job.wait()
    found = status(tmp_path / "run")
    assert (found["outcome"], found["lost_rank"]) == ("failed", True)
    assert "lost contact with another rank: waited at step " in found["reason"]
    assert "for rank 1 on " in found["reason"]
    assert "stopped" in found["reason"]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("distgan: error: ")]
    assert {line.split(" lost contact")[0] for line in lines} == {"distgan: error: rank 0", "distgan: error: rank 2"}


def test_a_rank_that_is_killed_is_named_at_once(tmp_path: Path, digits: Path) -> None:
    # The time-out of ten minutes is not what ends the others.
    job = Job(3, ["train", str(recipe(tmp_path, digits, training=ENDLESS)), "training.batch_size=18"])
    wait_for_rows(tmp_path / "run", job, 2)
    job.kill(2)
    found = status(tmp_path / "run")
    assert (found["outcome"], found["lost_rank"]) == ("failed", True)
    assert "for rank 2 on " in found["reason"]
    assert "its process has ended" in found["reason"]
