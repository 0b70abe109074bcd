"""Checks of each process's machine: versions, devices, cores, shared memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from pathlib import Path

import torch

from distgan.data.kinds.images import JPEG_DECODER
from distgan.distributed.runtime import Runtime
from distgan.doctor.finding import Finding
from distgan.packages import missing_packages
from distgan.version import __version__, code_digest

_SHARED_MEMORY_LEAST = 1e9


def versions(runtime: Runtime) -> Finding:
    """Check that all ranks have the same versions. Collective: call on every rank."""
    packages = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("accelerate", "deepspeed"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        packages["CUDA"] = str(torch.version.cuda)
        packages["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    packages["distgan"] = f"{__version__} (code {code_digest()[:8]})"
    said = ", ".join(f"{name} {version}" for name, version in packages.items())
    everywhere = runtime.gather_objects(said)
    others = [rank for rank, other in enumerate(everywhere) if other != everywhere[0]]
    if not others:
        return Finding("ok", "versions", said)
    return Finding(
        "FAILED",
        "versions",
        f"versions differ: rank 0 has {everywhere[0]}, rank {', '.join(map(str, others))} has "
        f"{everywhere[others[0]]}; install the same environment on every node",
    )


def packages() -> Finding:
    """Check which optional packages are installed."""
    missing = missing_packages()
    if not missing:
        return Finding("ok", "packages", f"all optional packages are installed; JPEG decoder: {JPEG_DECODER}")
    said = "; ".join(f"{package.name} is not installed: {package.without}" for package in missing)
    return Finding("warning", "packages", f"{said}; pip install {' '.join(package.name for package in missing)}")


def processes(runtime: Runtime) -> Finding:
    """Check that each process has its own device. Collective: call on every rank."""
    here = (socket.gethostname(), str(runtime.device))
    seats = runtime.gather_objects(here)
    hosts = {host for host, _ in seats}
    said = f"{len(seats)} on {len(hosts)} host{'s' * (len(hosts) > 1)}"
    if runtime.device.type == "cpu":
        return Finding("ok", "processes", f"{said}, on CPUs")
    doubled = next((seat for seat in seats if seats.count(seat) > 1), None)
    if doubled is not None:
        host, device = doubled
        text = f"{said}; several processes share {device} of {host}; start one process per GPU"
        return Finding("FAILED", "processes", text)
    idle = torch.cuda.device_count() - sum(host == here[0] for host, _ in seats)
    if idle > 0:
        fix = "start one process per GPU: accelerate launch --multi_gpu --num_processes N, or set CUDA_VISIBLE_DEVICES"
        return Finding("warning", "processes", f"{said}; {idle} GPUs have no process; {fix}")
    return Finding("ok", "processes", f"{said}, one per GPU")


def device(runtime: Runtime) -> Finding:
    """Check the device of this rank."""
    if runtime.device.type == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        free, total = torch.cuda.mem_get_info(runtime.device)
        said = f"{properties.name}, {total / 1e9:.0f} GB"
        if free < 0.9 * total:
            return Finding(
                "warning", "device", f"{said}, only {free / 1e9:.0f} GB free; stop the other programs on this GPU"
            )
        return Finding("ok", "device", said)
    if Path("/dev/nvidiactl").exists():
        return Finding(
            "FAILED",
            "device",
            "an NVIDIA driver is installed, but torch finds no GPU; install a torch for the driver's CUDA version "
            "(shown by nvidia-smi), and check CUDA_VISIBLE_DEVICES",
        )
    return Finding("ok", "device", f"CPU, {torch.get_num_threads()} threads per process")


def cores(runtime: Runtime, workers: int) -> Finding:
    """Check that this host has a core per process and data loader worker. Collective: call on every rank."""
    hosts = runtime.gather_objects(socket.gethostname())
    here = hosts.count(socket.gethostname())
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = here * (1 + workers)
    said = f"{available} for {here} process{'es' * (here > 1)} with {workers} data loader workers each"
    if available < wanted:
        fix = "request more (--cpus-per-task in Slurm), or lower data.num_workers"
        return Finding("warning", "cores", f"{said}, expected at least {wanted}; {fix}")
    return Finding("ok", "cores", said)


def shared_memory() -> Finding:
    """Check the shared memory that data loader workers pass batches in; containers often have only 64 MB."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("ok", "shared memory", "no /dev/shm on this system, so no limit")
    if free < _SHARED_MEMORY_LEAST:
        fix = "start the container with more, for example docker run --shm-size=8g"
        expected = f"expected {_SHARED_MEMORY_LEAST / 1e9:g} GB"
        return Finding("warning", "shared memory", f"{free / 1e6:.0f} MB free in /dev/shm, {expected}; {fix}")
    return Finding("ok", "shared memory", f"{free / 1e9:.1f} GB free in /dev/shm")
