"""Being asked to stop.

A run is asked by SIGTERM, by SIGUSR1 (Slurm's warning before the time limit), by SIGHUP (its terminal is gone), by
Ctrl-C, or by the file `stop.request` in its folder, which `distgan stop` writes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from distgan.data.loader_processes import STOP_SIGNALS
from distgan.errors import UserError
from distgan.files import write_atomically, writing
from distgan.runs.status import now, read_status

logger = logging.getLogger("distgan")

SAME_PRESS_SECONDS = 2.0
"""A Ctrl-C reaches a rank from the terminal and once more from its launcher; so close together they are one."""
POLL_SECONDS = 1.0


class StopRequest:
    """Whether somebody wants this run to save and leave. A context manager, which puts signal handlers back.

    The handlers only take note; a second Ctrl-C, though, raises KeyboardInterrupt. They are installed in the main
    thread only, as Python requires.

    Args:
        run_dir: the run folder, where `stop.request` appears.
        main: whether this rank looks for the file, once a second. An older request is removed on entry.
    """

    def __init__(self, run_dir: str | Path, *, main: bool) -> None:
        self.reason: str | None = None
        """`SIGTERM`, `SIGUSR1`, `SIGHUP`, `SIGINT` or `stop request`: the first that this rank knows of."""
        self._file = _request_file(run_dir)
        self._watches = main
        self._over = threading.Event()
        self._interrupted: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether this rank was asked."""
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        if self._watches:
            self._consume()
            # Not in the loop: on shared storage that hangs for a while, all ranks would wait for it at every step.
            threading.Thread(target=self._watch, name="stop request", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._take_note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child inherits the handler, but is to end as any process does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            pressed = time.monotonic()
            if self._interrupted is not None and pressed - self._interrupted >= SAME_PRESS_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = pressed if self._interrupted is None else self._interrupted
        if self.reason is None:
            self.reason = signal.Signals(number).name

    def _watch(self) -> None:
        while self.reason is None and not self._over.wait(POLL_SECONDS):
            if self._consume() and self.reason is None:
                self.reason = "stop request"

    def _consume(self) -> bool:
        """Whether there was a request; it is there no more."""
        try:
            self._file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            # On a file system that is read-only or in trouble this says nothing of whether the file is there.
            if not os.path.exists(self._file):
                return False
            logger.warning("%s cannot be removed: %s", self._file, error.strerror)
        return True


def request_stop(run_dir: str | Path) -> None:
    """Ask a running job, wherever it runs, to save and leave.

    Raises:
        UserError: nothing runs in that folder, or it cannot be written to.
    """
    status = read_status(run_dir)
    if status is None:
        raise UserError(f"{run_dir}: no status.json there; give the folder of a run (its run_dir)")
    if status.outcome != "running":
        raise UserError(
            f"{run_dir}: nothing to stop: the run is {status.outcome} since {status.time}; "
            "if its job waits in a queue, cancel it there"
        )
    if status.host == socket.gethostname() and not Path(f"/proc/{status.pid}").exists() and Path("/proc").is_dir():
        raise UserError(f"{run_dir}: nothing to stop: its process {status.pid} has gone without a word")
    asked = f"{now()} by process {os.getpid()} on {socket.gethostname()}\n"
    with writing(_request_file(run_dir), "the request", name=run_dir):
        write_atomically(_request_file(run_dir), asked.encode())


def _request_file(run_dir: str | Path) -> Path:
    return Path(run_dir) / "stop.request"
