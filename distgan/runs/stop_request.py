"""Stop requests to a run.

A stop request is SIGTERM, SIGUSR1 (Slurm's warning before the time limit), SIGHUP (the terminal closed), Ctrl-C, or the
file `stop.request` in the run folder, which `distgan stop` writes.
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
from distgan.runs.status import now, read_status, was_killed

logger = logging.getLogger("distgan")

REQUEST = "stop.request"
"""Name of the file of a stop request."""
SAME_PRESS_SECONDS = 2.0
"""A Ctrl-C reaches a rank from the terminal and again from its launcher. Within this time both count as one."""
POLL_SECONDS = 1.0


class StopRequest:
    """Context manager that records requests to save and exit, and restores the signal handlers.

    The handlers only record the request, but a second Ctrl-C raises KeyboardInterrupt. They are installed in the main
    thread only, as Python requires.

    Args:
        run_dir: the run folder, in which `stop.request` appears.
        main: if True, this rank polls for the file once per second, and removes an older request on entry.
    """

    def __init__(self, run_dir: str | Path, *, main: bool) -> None:
        self.reason: str | None = None
        """First request that this rank received: `SIGTERM`, `SIGUSR1`, `SIGHUP`, `SIGINT` or `stop request`."""
        self._file = _request_file(run_dir)
        self._watches = main
        self._over = threading.Event()
        self._interrupted: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Return True if this rank received a stop request."""
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        if self._watches:
            self._consume()
            # In a thread: if shared storage hangs, polling in the loop would stall all ranks at every step.
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
        if os.getpid() != self._process:  # a forked child inherits the handler, but must end by the signal
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
        """Remove the request file. Return True if there was one."""
        try:
            self._file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            # On a read-only or failing file system the error does not tell if the file exists.
            if not os.path.exists(self._file):
                return False
            logger.warning("%s: cannot be removed: %s", self._file, error.strerror)
        return True


def request_stop(run_dir: str | Path) -> None:
    """Ask a running job, on any host, to save and exit.

    Raises:
        UserError: no job runs in the folder, or the folder is not writable.
    """
    status = read_status(run_dir)
    if status is None:
        raise UserError(f"{run_dir}: no status.json in it; pass the run_dir of a run")
    if status.outcome != "running":
        raise UserError(
            f"{run_dir}: nothing to stop: the run is {status.outcome} since {status.time}; "
            "if its job is queued, cancel it in the scheduler"
        )
    if was_killed(run_dir, status):
        raise UserError(
            f"{run_dir}: nothing to stop: process {status.pid} is no longer running and wrote no final status"
        )
    asked = f"{now()} by process {os.getpid()} on {socket.gethostname()}\n"
    with writing(_request_file(run_dir), "the request", name=run_dir):
        write_atomically(_request_file(run_dir), asked.encode())


def _request_file(run_dir: str | Path) -> Path:
    return Path(run_dir) / REQUEST
