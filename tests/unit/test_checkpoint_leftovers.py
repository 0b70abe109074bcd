"""Checkpoints that are older, damaged, given up or half written: what the next writer makes of them."""

from __future__ import annotations

import os
import random
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest

from distgan.checkpoint import directory
from distgan.checkpoint.directory import newest_valid
from distgan.checkpoint.writer import CheckpointWriter
from distgan.data.loader_processes import start_worker_server
from tests.checkpoints import assert_holds, contents, damage_flip, names, save, step_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_pruning_leaves_what_it_did_not_write_and_what_is_damaged(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 1)
        (folder / "step-00000001" / "generator.1-of-1.safetensors").write_bytes(b"short")
        (folder / "step-00000002").mkdir()
        (folder / "step-00000002" / "mine.txt").write_text("notes")
        (folder / "notes").mkdir()
        save(writer, 3)
        save(writer, 4)
    assert names(folder) == ["latest", "notes", "step-00000001", "step-00000002", "step-00000004"]


def test_damaged_checkpoints_do_not_push_out_the_last_valid_one(folder: Path) -> None:
    """Two newer ones were cut short on disk: with keep=2 they would otherwise leave nothing to go back to."""
    with closing(CheckpointWriter(folder, keep=2)) as writer:
        for step in (1, 2, 3):
            save(writer, step)
    for step in (2, 3):
        os.truncate(folder / f"step-{step:08d}" / "generator.1-of-1.safetensors", 100)
    save(CheckpointWriter(folder, keep=2), 4)
    os.truncate(folder / "step-00000004" / "generator.1-of-1.safetensors", 100)
    assert newest_valid(folder) is None
    save(CheckpointWriter(folder, keep=2), 5)
    save(CheckpointWriter(folder, keep=2), 6)
    os.truncate(folder / "step-00000006" / "generator.1-of-1.safetensors", 100)
    assert step_of(newest_valid(folder)) == 5


def test_a_step_saved_again_is_replaced(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 7)
        writer.save(7, contents(8), {"step": 8}, blocking=True)
    assert_holds(folder / "step-00000007", 8)
    assert names(folder) == ["latest", "step-00000007"]


def test_going_on_from_an_earlier_step_gives_up_the_later_ones(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=3)) as writer:
        for step in (10, 20, 30):
            save(writer, step)
        writer.mark_best(30, 1.0, "fid")
    with closing(CheckpointWriter(folder, keep=3)) as writer:
        save(writer, 15)
    assert sorted(directory.steps(folder)) == [10, 15, 30], "20 is given up, 30 is the best"
    assert newest_valid(folder) == folder / "step-00000015"
    damage_flip(folder / "step-00000015")
    assert newest_valid(folder) == folder / "step-00000010", "not 30, which is of the future that was given up"


def test_what_a_killed_writer_left_is_settled(folder: Path) -> None:
    """Killed between the two renames of a replacement: both directories are there, neither has the name."""
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 7)
    shutil.copytree(folder / "step-00000007", folder / "step-00000007.removed.tmp")
    shutil.copytree(folder / "step-00000007", folder / "step-00000003.removed.tmp")
    (folder / "step-00000007").rename(folder / "step-00000007.tmp")
    (folder / "step-00000008.tmp").mkdir()
    (folder / "step-00000008.tmp" / "generator.1-of-1.safetensors").write_bytes(b"half")
    (folder / "other.tmp").mkdir()
    for name in (".latest.12-ab.tmp", ".best.json.12-ab.tmp"):
        (folder / name).write_text("half")
    CheckpointWriter(folder, keep=1)
    assert names(folder) == ["latest", "other.tmp", "step-00000007"]
    assert_holds(folder / "step-00000007", 7)


def test_a_complete_replacement_without_the_name_wins(folder: Path) -> None:
    """Killed before the first rename of a replacement, with what is to be replaced damaged."""
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 7)
    shutil.copytree(folder / "step-00000007", folder / "step-00000007.tmp")
    damage_flip(folder / "step-00000007")
    CheckpointWriter(folder, keep=1)
    assert names(folder) == ["latest", "step-00000007"]
    assert_holds(folder / "step-00000007", 7)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_before_a_complete_checkpoint_has_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run went back to step 10. Its first new checkpoint counts, not those of the discarded steps."""
    with closing(CheckpointWriter(folder, keep=3)) as writer:
        for step in (10, 30):
            save(writer, step)
    with monkeypatch.context() as patch:
        patch.setattr(directory, "publish_folder", killed)
        with closing(CheckpointWriter(folder, keep=3)) as writer, pytest.raises(SystemExit):
            save(writer, 20)
    assert names(folder) == ["latest", "step-00000010", "step-00000020.tmp", "step-00000030"]
    assert directory.newest_step(folder) == 10, "a checkpoint that does not exist is not reported"
    CheckpointWriter(folder, keep=3)
    assert directory.newest_step(folder) == 20
    assert newest_valid(folder) == folder / "step-00000020"
    assert_holds(folder / "step-00000020", 20)


def killed(*_: object, **__: object) -> None:
    raise SystemExit


def write_forever(folder: Path, first: int) -> None:
    with closing(CheckpointWriter(folder, keep=2)) as writer:
        for step in range(first, first + 100_000):
            # Each step twice: replacing is the harder of the two.
            save(writer, step)
            save(writer, step)


def test_killed_at_any_moment_what_is_found_is_whole(folder: Path) -> None:
    """kill -9 of a process that does nothing but write checkpoints, at random times."""
    context = start_worker_server()  # this process has one fork server for everything
    moments = random.Random(0)
    reached = 0
    for _ in range(25):
        process = context.Process(target=write_forever, args=(folder, reached + 1))
        process.start()
        before = reached
        deadline = time.monotonic() + 60
        while not (folder / "latest").exists() or step_of(Path((folder / "latest").read_text().strip())) <= before:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        published = step_of(Path((folder / "latest").read_text().strip()))
        CheckpointWriter(folder, keep=2)
        path = newest_valid(folder)
        reached = step_of(path)
        assert path is not None
        assert_holds(path, reached)
        assert reached >= published > before, "what was once there is not lost"
        assert not list(folder.glob("step-*.tmp"))
    for step in directory.steps(folder):
        assert_holds(folder / f"step-{step:08d}", step)
