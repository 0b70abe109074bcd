"""Checkpoints that all ranks write: published whole by all or not at all, whatever happens to one of them."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distgan.checkpoint import directory, writer
from distgan.checkpoint.directory import newest_valid
from distgan.checkpoint.layout import read_layout
from distgan.checkpoint.writer import CheckpointWriter
from distgan.distributed.control import Control
from tests.checkpoints import assert_holds, names, save, step_of
from tests.ranks import Processes, RankPool


def open_writer(folder: Path, *, keep: int = 2) -> CheckpointWriter:
    """A writer of this rank, on process groups of its own."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    groups = [Control(timedelta(seconds=60)) for _ in range(2)]
    return CheckpointWriter(folder, keep=keep, ranks=groups[0], background=groups[1])


def write_with_a_fault(folder: Path, fault: str) -> tuple[list[bool], int, list[str]]:
    """Save steps 1 to 3, the second with a fault on the last rank; results, failures, and what this rank said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distgan").addHandler(handler)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def scarce(*_: object, **__: object) -> None:
        raise MemoryError

    saved = []
    try:
        with closing(open_writer(folder)) as writing, pytest.MonkeyPatch.context() as patch:
            for step in (1, 2, 3):
                if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
                    if fault == "disk":
                        patch.setattr(os, "fsync", full)
                    else:
                        patch.setattr(writer.Snapshot, "copy", scarce)
                saved.append(save(writing, step))
                patch.undo()
            return saved, writing.failures, said
    finally:
        logging.getLogger("distgan").removeHandler(handler)


@pytest.mark.parametrize(
    ("fault", "told"), [("disk", "rank 1: No space left on device: "), ("memory", "rank 1: MemoryError")]
)
def test_a_fault_of_one_rank_publishes_nothing(tmp_path: Path, ranks: RankPool, fault: str, told: str) -> None:
    """All ranks know, rank 0 says whose it was, and the next checkpoint is written."""
    found = ranks.run(2, write_with_a_fault, tmp_path / "checkpoints", fault)
    assert [(saved, failures) for saved, failures, _ in found] == [([True, False, True], 1)] * 2
    (line,) = found[0][2]
    assert f"checkpoint of step 2 failed: {told}" in line
    assert "last good checkpoint: " in line
    assert "step-00000001" in line
    assert found[1][2] == []
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000001", "step-00000003"]
    assert_holds(tmp_path / "checkpoints" / "step-00000003", 3)


def write_slowly(folder: Path) -> list[bool]:
    """Save three times without waiting, while the last rank's files take half a second each."""
    with pytest.MonkeyPatch.context() as patch, closing(open_writer(folder)) as writing:
        patch.setattr(writer, "_PATIENCE_SECONDS", 0.01)
        write, slow = writer.write_file, dist.get_rank() == dist.get_world_size() - 1

        def late(*arguments: Any) -> Any:
            time.sleep(0.5 if slow else 0.0)
            return write(*arguments)

        patch.setattr(writer, "write_file", late)
        return [writing.save(step, {"a": {"x": torch.full((100, 100), step)}}, {"step": step}) for step in (1, 2, 3)]


def test_ranks_skip_the_same_checkpoints(tmp_path: Path, ranks: RankPool) -> None:
    assert ranks.run(3, write_slowly, tmp_path / "checkpoints") == [[True, False, False]] * 3
    assert directory.steps(tmp_path / "checkpoints") == [1]
    assert read_layout(tmp_path / "checkpoints" / "step-00000001").world_size == 3


def kill_at(point: int, folder: Path) -> Callable[[], int]:
    """Make this process kill itself at one of the points of the protocol; count those that it has passed.

    A point lies before each change of the checkpoint folder, before each sync, and before and after each exchange.
    """
    passed = 0

    def reach() -> None:
        nonlocal passed
        passed += 1
        if passed > point:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wx+")
        if (writes or opened) and str(arguments[0]).startswith(str(folder)):
            reach()

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            reach()
            result = original(*arguments, **named)
            reach()
            return result

        return wrapped

    sys.addaudithook(audited)
    os.fsync = around(os.fsync)
    for name in ("gather_objects", "gather_on_main"):
        setattr(Control, name, around(getattr(Control, name)))
    return lambda: passed


def die_while_writing(folder: Path, results: Path, victim: int, point: int) -> None:
    """Save steps 1 and 2 on each rank. The victim dies at a point of the second, or writes how many it has passed."""
    writing = open_writer(folder, keep=1)
    assert save(writing, 1)
    passed = kill_at(point, folder) if dist.get_rank() == victim else None
    saved = save(writing, 2)
    (results / str(dist.get_rank())).write_text(str(passed() if passed is not None else saved))


def walk(tmp_path: Path, world_size: int, victim: int) -> tuple[int, set[int]]:
    """Kill the victim at each point. Return the number of points, and the newest checkpoints that were left."""
    left, point = set(), 0
    while True:
        folder, results = tmp_path / f"{victim}-{point}", tmp_path / f"results-{victim}-{point}"
        results.mkdir()
        job = Processes(world_size, die_while_writing, folder, results, victim, point)
        codes = job.wait(60)
        dies = codes[victim] == -signal.SIGKILL
        others = [code for rank, code in enumerate(codes) if rank != victim]
        assert others == [0] * (world_size - 1), f"point {point}: the others must go on"
        newest = newest_valid(folder)
        assert newest is not None
        left.add(step_of(newest))
        assert_holds(newest, step_of(newest))
        # The next start settles what is left, and writes on.
        with closing(CheckpointWriter(folder, keep=1)) as next_writer:
            settled = newest_valid(folder)
            assert settled is not None
            assert step_of(settled) >= step_of(newest)
            assert_holds(settled, step_of(settled))
            assert save(next_writer, 3)
        assert names(folder) == ["latest", "step-00000003"]
        if not dies:
            assert step_of(newest) == 2
            return int((results / str(victim)).read_text()), left
        if step_of(newest) == 1:
            survivors = {rank for rank in range(world_size) if rank != victim}
            assert {(results / str(rank)).read_text() for rank in survivors} == {"False"}
        point += 1


def test_a_rank_killed_at_any_point_leaves_a_valid_newest_checkpoint(tmp_path: Path) -> None:
    """Rank 1 of two: it makes its file, writes it, reports, and hears of the end."""
    points, left = walk(tmp_path, 2, victim=1)
    assert points == 14, "in the order of the protocol: each is one that a rank other than 0 passes"
    assert left == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (4, 0), (4, 2)])
def test_any_rank_killed_at_any_point_leaves_a_valid_newest_checkpoint(
    tmp_path: Path, world_size: int, victim: int
) -> None:
    points, left = walk(tmp_path, world_size, victim)
    assert points >= (40 if victim == 0 else 14)
    assert left == {1, 2}
