"""Doing something bad to a run, and how long it takes until that is noticed and until it trains again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from distgan.runs.status import read_status
from tests.cluster.slurm import wait_until
from tests.runs import rows


class Measured(NamedTuple):
    """Seconds from a fault until it was noticed, and until the next row of metrics after it; None if that is not."""

    noticed: float | None
    again: float | None
    test: str


MEASURED: dict[str, Measured] = {}
"""By the name of a fault: what was measured last."""


def record(name: str, *, noticed: float | None = None, again: float | None = None) -> None:
    """Keep what the current test has measured, for the table at the end of the session."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].partition(" ")[0].partition("[")[0]
    MEASURED[name] = Measured(noticed, again, test)


def measure(name: str, run: Path, fault: Callable[[], object]) -> None:
    """Do it, and wait until the run trains again in another attempt."""
    before = read_status(run)
    assert before is not None
    start = time.monotonic()
    fault()
    seconds: list[float] = []

    def noticed() -> bool:
        status = read_status(run)
        return status is not None and (status.outcome != "running" or status.restarts > before.restarts)

    def again() -> bool:
        status = read_status(run)
        if status is None or status.restarts == before.restarts:
            return False
        return bool(rows(run)) and (run / "metrics.jsonl").stat().st_mtime > (run / "status.json").stat().st_mtime

    for condition in (noticed, again):
        wait_until(condition, f"{name}: not {condition.__name__}")
        seconds.append(time.monotonic() - start)
    record(name, noticed=seconds[0], again=seconds[1])


def trainer(variable: str, rank: int) -> psutil.Process:
    """The process of one rank, among those that have `variable` (NAME=VALUE) in their environment."""
    name, _, value = variable.partition("=")
    for process in psutil.process_iter():
        try:
            environment, line = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        # Loaders inherit the environment, but their command line is another.
        if environment.get(name) == value and environment.get("RANK") == str(rank) and "distgan" in line:
            return process
    raise AssertionError(f"no rank {rank} with {variable}")


def wait_for_step(run: Path, step: int) -> None:
    """Until the checkpoint of a step is there."""
    path = run / "checkpoints" / f"step-{step:08d}"
    wait_until(path.exists, f"{path} does not appear")


def rows_if_any(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics so far."""
    return rows(run) if (run / "metrics.jsonl").exists() else []
