"""Being asked to stop by a signal or a file, and status.json."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from distgan.data.loader_processes import STOP_SIGNALS
from distgan.errors import UserError
from distgan.runs import stop_request
from distgan.runs.status import read_status, write_failure, write_status
from distgan.runs.stop_request import StopRequest, request_stop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A monotonic clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: now[0])
    return now


def wait_until_asked(stop: StopRequest) -> None:
    deadline = time.monotonic() + 20
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop.requested


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_noted_and_the_handler_put_back(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopRequest(tmp_path, main=False) as stop:
        assert not stop.requested
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == name, "the first reason stays"
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_handlers_are_put_back_after_an_error(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopRequest(tmp_path, main=False):
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_press_arriving_twice_is_one_and_a_second_press_aborts(tmp_path: Path, clock: list[float]) -> None:
    with StopRequest(tmp_path, main=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1.9
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        clock[0] += 0.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_press_after_another_signal_does_not_abort(tmp_path: Path, clock: list[float]) -> None:
    with StopRequest(tmp_path, main=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 10
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGTERM"


def test_outside_the_main_thread_only_the_file_counts(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    write_status(tmp_path, "running")
    seen = []

    def run() -> None:
        with StopRequest(tmp_path, main=True) as stop:
            seen.append(signal.getsignal(signal.SIGTERM))
            request_stop(tmp_path)
            wait_until_asked(stop)
            seen.append(stop.reason)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, "stop request"]


def wait_forever(started: Event) -> None:
    started.set()
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_forked_child_still_ends_by_signals(tmp_path: Path, number: signal.Signals) -> None:
    with StopRequest(tmp_path, main=False):
        context = multiprocessing.get_context("fork")
        started = context.Event()
        child = context.Process(target=wait_forever, args=(started,))
        child.start()
        assert started.wait(20)  # a signal that comes while Python forks is lost
        os.kill(child.pid or 0, number)
        child.join(20)
        code = child.exitcode
        child.kill()
    assert code == -number


def test_a_stop_request_reaches_the_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_request, "POLL_SECONDS", 0.01)
    write_status(tmp_path, "running", world_size=1)
    request_stop(tmp_path)
    with StopRequest(tmp_path, main=True) as stop, StopRequest(tmp_path, main=False) as other:
        assert not (tmp_path / "stop.request").exists(), "it is from before this start"
        time.sleep(0.1)
        assert not stop.requested
        request_stop(tmp_path)
        wait_until_asked(stop)
        assert stop.reason == "stop request"
        assert not other.requested
        assert not (tmp_path / "stop.request").exists()
    with StopRequest(tmp_path, main=True) as stop:
        time.sleep(0.1)
        assert not stop.requested


def test_storage_in_trouble_is_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux answers `unlink` with EROFS before it looks for the file, once a file system has turned read-only."""
    tried = threading.Event()

    def refuse(path: Path) -> None:
        tried.set()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(stop_request, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(Path, "unlink", refuse)
    with StopRequest(tmp_path, main=True) as stop:
        tried.clear()
        assert tried.wait(20)
        assert not stop.requested
        (tmp_path / "stop.request").touch()
        wait_until_asked(stop)
        assert stop.reason == "stop request"


def test_a_folder_that_hangs_holds_up_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that answers only when all is over, as a shared file system may for minutes."""
    monkeypatch.setattr(stop_request, "POLL_SECONDS", 0.01)
    hanging, over = threading.Event(), threading.Event()

    with StopRequest(tmp_path, main=True) as stop:

        def hang(path: Path) -> None:
            hanging.set()
            over.wait(20)
            raise FileNotFoundError

        monkeypatch.setattr(Path, "unlink", hang)
        assert hanging.wait(20)
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    over.set()


def test_stopping_what_does_not_run_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"status\.json"):
        request_stop(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"status\.json"):
        request_stop(tmp_path)
    write_status(tmp_path, "running")
    write_status(tmp_path, "finished", step=9)
    with pytest.raises(UserError, match="the run is finished since"):
        request_stop(tmp_path)
    assert not (tmp_path / "stop.request").exists()


def test_status_is_readable_by_scripts(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", step=10, world_size=4)
    assert write_status(tmp_path, "preempted", step=25, reason="SIGUSR1")
    document = json.loads((tmp_path / "status.json").read_text())
    assert document.pop("time").endswith("+00:00")
    assert document.pop("host")
    assert document == {
        "outcome": "preempted",
        "reason": "SIGUSR1",
        "lost_rank": False,
        "step": 25,
        "world_size": 4,
        "out_of_memory": None,
        "exhausted": None,
        "restarts": 0,
        "earlier": None,
        "launch": None,
        "pid": os.getpid(),
    }


def test_the_first_failure_of_an_attempt_stays(tmp_path: Path) -> None:
    write_status(tmp_path, "running", step=3, world_size=2)
    assert write_failure(tmp_path, 1, "ValueError: the true\ncause")
    assert not write_failure(tmp_path, 0, "RuntimeError: connection closed by peer")
    assert not write_status(tmp_path, "preempted", step=4, reason="SIGTERM")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.outcome, status.reason) == ("failed", "rank 1: ValueError: the true cause")
    assert (status.step, status.world_size, status.restarts) == (3, 2, 0)
    write_status(tmp_path, "running")
    assert write_status(tmp_path, "finished", step=9)
    assert not write_failure(tmp_path, 1, "something while leaving")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.outcome, status.reason, status.restarts) == ("finished", None, 1)


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    write_failure(tmp_path, 0, "x" * 100_000)
    assert len((tmp_path / "status.json").read_bytes()) < 3000


def test_a_damaged_status_is_named_and_does_not_stop_a_start(tmp_path: Path) -> None:
    for content in (b"", b"{", b'{"outcome": "sleeping"}', b"\xff", b" " * 100_000):
        (tmp_path / "status.json").write_bytes(content)
        with pytest.raises(UserError, match=r"status\.json"):
            read_status(tmp_path)
    write_status(tmp_path, "running")
    status = read_status(tmp_path)
    assert status is not None
    assert status.outcome == "running"


def test_an_unwritable_folder_fails_a_start_but_not_an_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "file"
    folder.write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"):
        write_status(folder, "running")
    assert not write_failure(folder, 0, "cause")
    assert "status.json: cannot write that the run is failed" in caplog.text


def test_of_many_ranks_failing_at_once_one_is_first(tmp_path: Path) -> None:
    """Processes with locks of their own: exactly one may find the attempt undecided."""
    write_status(tmp_path, "running")
    context = multiprocessing.get_context("fork")
    start = context.Event()
    written = context.Queue()

    def fail(rank: int) -> None:
        start.wait(20)
        written.put((rank, write_failure(tmp_path, rank, "cause")))

    children = [context.Process(target=fail, args=(rank,)) for rank in range(8)]
    for child in children:
        child.start()
    start.set()
    winners = [rank for rank, first in (written.get(timeout=30) for _ in children) if first]
    for child in children:
        child.join(20)
    assert len(winners) == 1
    status = read_status(tmp_path)
    assert status is not None
    assert status.reason == f"rank {winners[0]}: cause"
