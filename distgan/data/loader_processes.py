"""Start data loader workers that ignore the trainer's stop signals and end when the trainer ends.

Workers come from Python's fork server, which has imported torch once. A new worker therefore starts in milliseconds
and shares that memory. Forking the trainer itself would copy its threads' locks and fsspec's event loops.

This module imports little, so that the server can start early and import torch at the same time as the trainer.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

_PRELOAD = "distgan.data.stream"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that make a trainer save and stop."""


def start_worker_server() -> ForkServerContext:
    """Start the fork server if it is not running, and return the context that starts processes from it.

    Slurm and terminals signal every process of a job. The server and its children inherit a mask that blocks these
    signals, because the trainer still needs samples until it stops.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    resource_tracker.ensure_running()  # start it first: it resets the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_worker(_worker: int, *, environment: dict[str, str]) -> None:
    """Initialize a data loader worker (`worker_init_fn`).

    `environment` holds the trainer's environment variables, which may have been set after the server started.
    """
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=exit_with_parent, name="trainer-watch", daemon=True).start()


def exit_with_parent() -> None:
    """End this process when the one that started it is gone, however it died.

    A data loader watches its own parent, but that is the fork server, which lives for as long as its children do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
