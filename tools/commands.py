"""Run distgan's command line from the tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {
    "ddp": "multi-gpu.yaml",
    "zero1": "deepspeed-zero1.yaml",
    "zero2": "deepspeed-zero2.yaml",
    "fsdp": "fsdp.yaml",
}
"""Engine -> its accelerate config in launch/accelerate."""


def distgan(*arguments: str) -> str:
    """Run a distgan command in the root of the repository, and return its output.

    Raises:
        SystemExit: the command failed; carries its exit status.
    """
    done = subprocess.run([sys.executable, "-m", "distgan", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def later_wins(*overrides: str) -> list[str]:
    """Return `key=value` overrides with the last value of each key. The command line refuses a key with two values."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def launched(count: int, *arguments: str) -> list[str]:
    """Return the command line that runs a distgan command with `count` processes on this machine."""
    if count == 1:
        return [sys.executable, "-m", "distgan", *arguments]
    launcher = (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    )  # fmt: skip
    return [sys.executable, *launcher, "-m", "distgan", *arguments]


def under_engine(engine: str, processes: int, *program: str) -> list[str]:
    """Return the command line that runs a Python program on this machine with one of `ENGINES`."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/accelerate" / ENGINES[engine]))
    return [sys.executable, *launcher, "--num_processes", str(processes), *program]


def processes() -> int:
    """Return the number of GPUs, or two without a GPU."""
    import torch

    return torch.cuda.device_count() or 2
