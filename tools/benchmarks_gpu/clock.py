"""Clocks and memory of the device that a measurement runs on."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch


def device() -> torch.device:
    """Return the GPU, or the CPU in a dry run, which hides GPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one. Call it before reading the host's clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], *, warm_up: int = 3, repeats: int = 10) -> float:
    """Return the median time of `work` in seconds, measured with CUDA events on a GPU."""
    for _ in range(warm_up):
        work()
    synchronize()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            times.append(float(began.elapsed_time(ended)) / 1e3)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def forget() -> None:
    """Free cached memory and reset the memory peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gigabytes() -> float | None:
    """Return the peak memory of tensors on the GPU since `forget`, in 1e9 bytes; None on the CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
