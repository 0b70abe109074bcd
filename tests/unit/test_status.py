"""How a run stands, for scripts, and the run that a recipe means."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import socket
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from distgan.cli import main
from distgan.errors import UserError
from distgan.files import try_lock
from distgan.runs import status
from distgan.runs.folder import run_folder_of
from distgan.runs.status import RUN_LOCK, read_status, standing, write_failure, write_status
from distgan.runs.stop_request import request_stop


def test_each_outcome_is_one_word(tmp_path: Path) -> None:
    assert str(standing(tmp_path)) == "none -1"
    write_status(tmp_path, "running")
    assert str(standing(tmp_path)) == "running -1"
    (tmp_path / "checkpoints" / "step-00000120").mkdir(parents=True)
    write_status(tmp_path, "preempted", step=120, reason="SIGUSR1")
    assert str(standing(tmp_path)) == "preempted 120 SIGUSR1"
    write_status(tmp_path, "running")
    write_failure(tmp_path, 1, "ValueError: broken")
    assert str(standing(tmp_path)) == "failed 120 rank 1: ValueError: broken"


def test_what_failed_for_want_of_a_rank_is_lost_and_only_that(tmp_path: Path) -> None:
    write_status(tmp_path, "running")
    write_failure(tmp_path, 0, "lost contact with another rank", lost_rank=True)
    write_failure(tmp_path, 1, "ValueError: later")
    assert standing(tmp_path).outcome == "lost"
    write_status(tmp_path, "running")
    write_failure(tmp_path, 1, "ValueError: first")
    write_failure(tmp_path, 0, "lost contact with another rank", lost_rank=True)
    assert standing(tmp_path).outcome == "failed"


def train_for_ever(folder: Path, started: Event) -> None:
    with open(folder / RUN_LOCK, "w") as lock:
        assert try_lock(lock.fileno())
        write_status(folder, "running")
        started.set()
        time.sleep(600)


def test_killed_is_told_from_running_by_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=train_for_ever, args=(tmp_path, started))
    process.start()
    try:
        assert started.wait(20)
        assert str(standing(tmp_path)) == "running -1"
    finally:
        process.kill()
        process.join()
    assert str(standing(tmp_path)) == "killed -1"
    with pytest.raises(UserError, match="no longer running and wrote no final status"):
        request_stop(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert standing(tmp_path).outcome == "running", "another host cannot know"


@pytest.mark.parametrize("locks", ["no lock file", "no locks"])
def test_without_locks_the_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str) -> None:
    if locks == "no locks":
        (tmp_path / RUN_LOCK).touch()
        monkeypatch.setattr(fcntl, "flock", refuse)
    write_status(tmp_path, "running")
    assert standing(tmp_path).outcome == "running"
    process = multiprocessing.get_context("fork").Process(target=write_status, args=(tmp_path, "running"))
    process.start()
    process.join()
    assert standing(tmp_path).outcome == "killed"
    write_status(tmp_path, "preempted", step=3, reason="SIGTERM")
    assert standing(tmp_path).outcome == "preempted"


def refuse(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(tmp_path, "running")

    def ends(*_: object) -> bool:
        write_status(tmp_path, "finished", step=9)
        return True

    monkeypatch.setattr(status, "was_killed", ends)
    assert str(standing(tmp_path)) == "finished -1"


def test_a_launch_is_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(standing(tmp_path, "7.0")) == "unstarted -1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7.0")
    write_status(tmp_path, "running")
    # The outcome is that of the attempt, whoever writes it.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    write_status(tmp_path, "preempted", step=0, reason="SIGTERM")
    assert str(standing(tmp_path, "7.0")) == str(standing(tmp_path)) == "preempted -1 SIGTERM"
    main(["status", "--launch", "7.1", str(tmp_path)])
    assert capsys.readouterr().out == "unstarted -1\n"
    write_status(tmp_path, "running")
    assert str(standing(tmp_path, "7.0")) == "unstarted -1"


def test_a_recipe_means_its_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\ndata: {{path: d, resolution: 32}}\ntraining: {{steps: 5, batch_size: 8}}\n"
    )
    assert run_folder_of(str(recipe)) == tmp_path / "run"
    assert run_folder_of(str(recipe), [f"run_dir={tmp_path / 'other'}"]) == tmp_path / "other"
    with pytest.raises(UserError, match=r"remove training\.steps=5"):
        run_folder_of(str(tmp_path), ["training.steps=5"])
    (tmp_path / "other").mkdir()
    write_status(tmp_path / "other", "finished", step=5)
    main(["status", str(recipe), f"run_dir={tmp_path / 'other'}"])
    assert capsys.readouterr().out == "finished -1\n"


@pytest.mark.parametrize("name", ["status.json", "config.yaml", "checkpoints"])
def test_a_run_folder_is_known_by_what_a_run_leaves(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert run_folder_of(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("command", ["status", "stop"])
@pytest.mark.parametrize(
    ("path", "part"), [("", "RUN_OR_CONFIG: empty"), ("samples", "not a run folder"), ("typo", "not a run folder")]
)
def test_other_folders_are_no_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    path: str,
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").mkdir()
    with pytest.raises(SystemExit) as caught:
        main([command, path])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("exhausted", ["{}", '{"micro_batches": "many"}', '{"micro_batches": 0}', "5"])
def test_a_status_of_a_stranger_is_damaged_and_not_a_traceback(tmp_path: Path, exhausted: str) -> None:
    write_status(tmp_path, "failed", reason="out of memory", exhausted={"micro_batches": 2})
    file = tmp_path / "status.json"
    assert read_status(tmp_path) is not None
    file.write_text(json.dumps(json.loads(file.read_text()) | {"exhausted": json.loads(exhausted)}))
    with pytest.raises(UserError, match=r"status\.json: damaged: .*; remove it"):
        read_status(tmp_path)
