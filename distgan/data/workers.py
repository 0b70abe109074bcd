"""Loader processes: started quickly, deaf to the signals that ask a trainer to save and leave, gone when it is gone.

They come from Python's fork server, which has imported torch once: a new worker takes milliseconds instead of
seconds, and shares that memory. Forking the trainer itself would copy its threads' locks and fsspec's event loops.

This module imports little, so that the server can be started first thing and import torch while the trainer does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

_PRELOAD = "distgan.data.stream"
_TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def start_worker_server() -> ForkServerContext:
    """Start the fork server unless it runs; the context that makes processes from it.

    Slurm and terminals signal every process of a job. The server and its children inherit a mask that blocks what is
    meant for the trainer, which must still be fed while it decides when to stop.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    resource_tracker.ensure_running()  # first, as it resets the mask when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_worker(_worker: int) -> None:
    """What a loader process does first (`worker_init_fn`)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    # Its parent is the server, which leaves as soon as the trainer does, however that dies.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
