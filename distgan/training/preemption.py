"""Being asked to stop, and saying how a run ended.

A run is asked by SIGTERM, by SIGUSR1 (Slurm's warning before the time limit), by SIGHUP (its terminal is gone), by
Ctrl-C, or by the file `stop.request` in its folder, which `distgan stop` writes. It says how it ended in `status.json`,
because launchers turn every exit code into 1.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from distgan.data.workers import STOP_SIGNALS
from distgan.errors import UserError
from distgan.files import read_bounded, write_atomically

logger = logging.getLogger("distgan")

SAME_PRESS_SECONDS = 2.0
"""A Ctrl-C reaches a rank from the terminal and once more from its launcher; so close together they are one."""
POLL_SECONDS = 1.0
_REASON_LIMIT = 2000
_STATUS_LIMIT = 64 << 10

Outcome = Literal["running", "finished", "preempted", "failed"]


class StopRequest:
    """Whether somebody wants this run to save and leave. A context manager, which puts signal handlers back.

    The handlers only take note; a second Ctrl-C, though, raises KeyboardInterrupt. They are installed in the main
    thread only, as Python requires.

    Args:
        run_dir: the run folder, where `stop.request` appears.
        main: whether this rank watches for the file. An older request is removed on entry.
    """

    def __init__(self, run_dir: str | Path, *, main: bool) -> None:
        self.reason: str | None = None
        """`SIGTERM`, `SIGUSR1`, `SIGHUP`, `SIGINT` or `stop request`: the first that this rank knows of."""
        self._file = _request_file(run_dir)
        self._watches = main
        self._polled = -POLL_SECONDS
        self._interrupted: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether this rank was asked; looks for the file at most once a second."""
        now = time.monotonic()
        if self._watches and self.reason is None and now - self._polled >= POLL_SECONDS:
            self._polled = now
            if self._consume() and self.reason is None:
                self.reason = "stop request"
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        if self._watches:
            self._consume()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._take_note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child inherits the handler, but is to end as any process does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted >= SAME_PRESS_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = now if self._interrupted is None else self._interrupted
        if self.reason is None:
            self.reason = signal.Signals(number).name

    def _consume(self) -> bool:
        """Whether there was a request; it is there no more."""
        try:
            self._file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("%s cannot be removed: %s", self._file, error.strerror)
        return True


class Status(BaseModel):
    """The content of status.json."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    reason: str | None = None
    """Why it failed, was preempted or finished early, in one line."""
    lost_rank: bool = False
    """Whether it failed for want of another rank only, which a restart mends."""
    step: int | None = None
    world_size: int | None = None
    restarts: int = 0
    """Attempts before this one in the same run folder."""
    time: str
    """When this was written: ISO 8601, UTC."""
    host: str
    pid: int


def request_stop(run_dir: str | Path) -> None:
    """Ask a running job, wherever it runs, to save and leave.

    Raises:
        UserError: nothing runs in that folder, or it cannot be written to.
    """
    status = read_status(run_dir)
    if status is None:
        raise UserError(f"{run_dir}: no status.json there; give the folder of a run (its run_dir)")
    if status.outcome != "running":
        raise UserError(f"{run_dir}: nothing to stop: the run is {status.outcome} since {status.time}")
    if status.host == socket.gethostname() and not Path(f"/proc/{status.pid}").exists() and Path("/proc").is_dir():
        raise UserError(f"{run_dir}: nothing to stop: its process {status.pid} has gone without a word")
    asked = f"{_now()} by process {os.getpid()} on {socket.gethostname()}\n"
    try:
        write_atomically(_request_file(run_dir), asked.encode())
    except OSError as error:
        raise UserError(f"{run_dir}: cannot write stop.request there: {error.strerror}") from None


def write_status(
    run_dir: str | Path,
    outcome: Outcome,
    *,
    step: int | None = None,
    reason: str | None = None,
    world_size: int | None = None,
    lost_rank: bool = False,
) -> bool:
    """Say how the run stands. `running` begins an attempt; the first other outcome of an attempt is its last.

    So neither the failures that follow from a rank's failure nor a later preemption take its place, whichever rank
    or node they come from.

    Returns:
        Whether it was written. A disk error is logged, except for `running`.

    Raises:
        OSError: the folder cannot be written to when an attempt begins.
    """
    file = Path(run_dir) / "status.json"
    try:
        with _exclusive(run_dir):
            before = _previous_status(run_dir)
            if outcome == "running":
                restarts = before.restarts + 1 if before else 0
            elif before and before.outcome != "running":
                return False
            else:
                restarts = before.restarts if before else 0
                step = step if step is not None or before is None else before.step
                world_size = world_size if world_size is not None or before is None else before.world_size
            status = Status(
                outcome=outcome,
                reason=reason,
                lost_rank=lost_rank,
                step=step,
                world_size=world_size,
                restarts=restarts,
                time=_now(),
                host=socket.gethostname(),
                pid=os.getpid(),
            )
            write_atomically(file, status.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        if outcome == "running":
            raise
        logger.error("%s: cannot say that the run is %s: %s", file, outcome, error)
        return False
    return True


def write_failure(run_dir: str | Path, rank: int, why: str, *, lost_rank: bool = False) -> bool:
    """Say that a rank failed, unless the outcome of this attempt is known already. Returns whether it was written."""
    line = " ".join(f"rank {rank}: {why}".split())
    return write_status(run_dir, "failed", reason=line[:_REASON_LIMIT], lost_rank=lost_rank)


def read_status(run_dir: str | Path) -> Status | None:
    """How the run of a folder stands; None when it never started. Raises UserError if the file is damaged."""
    file = Path(run_dir) / "status.json"
    if not file.exists():
        return None
    try:
        return Status.model_validate_json(read_bounded(file, _STATUS_LIMIT))
    except ValidationError as error:
        raise UserError(f"{file}: damaged: {error.errors(include_url=False)[0]['msg']}; remove it") from None


def _previous_status(run_dir: str | Path) -> Status | None:
    try:
        return read_status(run_dir)
    except UserError:
        return None


@contextmanager
def _exclusive(run_dir: str | Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; a lock that cannot be had in 2 s is done without."""
    with open(Path(run_dir) / ".status.lock", "w") as lock:
        for _ in range(40):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
            else:
                break
        yield


def _request_file(run_dir: str | Path) -> Path:
    return Path(run_dir) / "stop.request"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
