"""Checks between the ranks: all-reduce speed and clock differences."""

from __future__ import annotations

import statistics
import time

import torch

from distgan.distributed.runtime import Runtime
from distgan.doctor.finding import Finding

_LARGE = 1 << 22
"""Float32 numbers in the large all-reduce: 16 MiB, about the gradient of a small generator."""
_SLOW = 5e8
"""Bytes/s per rank below which a cluster probably does not use its fast network."""
_SKEW_WARNING, _SKEW_LIMIT = 2.0, 60.0


def sums(runtime: Runtime) -> list[Finding]:
    """Time all-reduces between devices, and between hosts if those use another backend. Collective."""
    if runtime.world_size == 1:
        return [Finding("ok", "all-reduce", "not needed with one process")]
    devices = [torch.device("cpu")] if runtime.device.type == "cpu" else [runtime.device, torch.device("cpu")]
    return [_sum(runtime, device) for device in devices]


def _sum(runtime: Runtime, device: torch.device) -> Finding:
    backend = "NCCL" if device.type == "cuda" else "gloo"
    correct = runtime.all_reduce_sum(torch.full((3,), float(runtime.rank + 1), device=device))
    expected = runtime.world_size * (runtime.world_size + 1) / 2
    if not bool((correct == expected).all()):
        fix = "check the driver, and run again with NCCL_DEBUG=INFO"
        return Finding("FAILED", "all-reduce", f"{backend} returns a wrong sum; {fix}")
    latency = _time(runtime, device, 1, repetitions=20)
    seconds = _time(runtime, device, _LARGE, repetitions=3)
    # The traffic per link of the optimal algorithm, whichever algorithm ran.
    rate = 2 * (runtime.world_size - 1) / runtime.world_size * 4 * _LARGE / seconds
    said = f"{backend}: {rate / 1e9:.2f} GB/s per rank, {latency * 1e3:.2f} ms for a single number"
    if rate < _SLOW:
        variable = "NCCL_SOCKET_IFNAME" if backend == "NCCL" else "GLOO_SOCKET_IFNAME"
        return Finding("warning", "all-reduce", f"{said}; this is slow; set {variable} to the fast network interface")
    return Finding("ok", "all-reduce", said)


def _time(runtime: Runtime, device: torch.device, count: int, *, repetitions: int) -> float:
    """Return the median seconds of an all-reduce of `count` float32 numbers, on the slowest rank."""
    numbers = torch.ones(count, device=device)
    seconds = []
    for _ in range(repetitions + 1):
        runtime.barrier()
        started = time.perf_counter()
        runtime.all_reduce_sum(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    # The first all-reduce sets up connections.
    return float(max(runtime.gather_objects(statistics.median(seconds[1:]))))


def clocks(runtime: Runtime) -> Finding:
    """Check how far the ranks' clocks differ, to within the time of an exchange. Collective: call on every rank."""
    differences = []
    for _ in range(5):
        runtime.barrier()
        times = runtime.gather_objects(time.time())
        differences.append([there - times[0] for there in times])
    offsets = [statistics.median(column) for column in zip(*differences, strict=True)]
    skew = max(offsets) - min(offsets)
    furthest = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    fix = "synchronize the clocks with ntp or chrony"
    if skew > _SKEW_LIMIT:
        text = f"rank {furthest} is {offsets[furthest]:+.0f} s off rank 0; object stores and Slurm reject this; {fix}"
        return Finding("FAILED", "clocks", text)
    if skew > _SKEW_WARNING:
        return Finding("warning", "clocks", f"rank {furthest} is {offsets[furthest]:+.1f} s off rank 0; {fix}")
    return Finding("ok", "clocks", f"within {skew * 1e3:.0f} ms")
