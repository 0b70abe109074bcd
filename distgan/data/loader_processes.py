"""Loader processes: started quickly, deaf to the signals that ask a trainer to save and leave, gone when it is gone.

They come from Python's fork server, which has imported torch once: a new worker takes milliseconds instead of
seconds, and shares that memory. Forking the trainer itself would copy its threads' locks and fsspec's event loops.

This module imports little, so that the server can be started first thing and import torch while the trainer does.
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
"""What asks a trainer to save and leave."""


def start_worker_server() -> ForkServerContext:
    """Start the fork server unless it runs; the context that makes processes from it.

    Slurm signals every process of a job, and so does a terminal, also when it is closed. The server and its children
    inherit a mask that blocks what is meant for the trainer, which must still be fed while it decides when to stop.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    resource_tracker.ensure_running()  # first, as it resets the mask when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_worker(_worker: int, *, environment: dict[str, str]) -> None:
    """What a loader process does first (`worker_init_fn`).

    `environment` is the trainer's, whose credentials and folders may have been set after the server started.
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
