"""Checks of the environment variables that launchers set, and the exit of launched processes.

This module imports nothing slow, because every command imports it first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distgan.errors import UserError


def is_first(rank: str) -> bool:
    """Return True if this is the first process of the run or of its node.

    Args:
        rank: environment variable to check: `RANK` for the run, `LOCAL_RANK` for the node.
    """
    alone = natural("WORLD_SIZE") in (None, 0, 1)
    return alone or os.environ.get(rank, "0") in ("", "0")


def check_launch() -> None:
    """Raise UserError if the environment sets WORLD_SIZE, but not valid variables to reach the other processes."""
    if "WORLD_SIZE" not in os.environ:
        return
    fix = "unset it, or start with `accelerate launch` or `torchrun`"
    world_size = natural("WORLD_SIZE")
    if not world_size:
        found = os.environ["WORLD_SIZE"][:80]
        raise UserError(f"WORLD_SIZE={found!r} in the environment: expected a number of processes; {fix}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={world_size} in the environment: {', '.join(missing)} not set; {fix}", everywhere=True
        )
    rank = natural("RANK")
    if world_size > 1 and (rank is None or rank >= world_size):
        raise UserError(
            f"RANK={os.environ['RANK'][:80]!r} in the environment: expected a number below WORLD_SIZE={world_size}; "
            + fix
        )


def leave(status: int) -> None:
    """Exit at once under a launcher, because the shutdown of a process group would wait for other ranks."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def check_world_size(world_size: int) -> None:
    """Raise UserError if the world size differs from the one that the launcher set in the environment."""
    promised = _promised_world_size()
    if promised is not None and promised != world_size:
        raise UserError(
            f"world size is {world_size}, expected {promised or 'several'}: the launcher started independent "
            "processes; use `accelerate launch --multi_gpu --num_processes N -m distgan ...`, also on machines without "
            "a GPU, or `torchrun --nproc-per-node N -m distgan ...`",
            everywhere=True,
        )


def _promised_world_size() -> int | None:
    """Return the world size that the environment implies: None if it implies none, 0 if above 1 but unknown."""
    environment = os.environ
    if (world_size := natural("WORLD_SIZE")) is not None:
        return world_size
    # `srun python -m distgan` with several tasks and without a launcher.
    tasks = natural("SLURM_STEP_NUM_TASKS")
    if "SLURM_STEP_ID" in environment and tasks is not None and tasks > 1:
        return tasks
    # `accelerate launch --cpu --num_processes 2` starts one process; only MASTER_ADDR shows it.
    from_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if from_accelerate and "MASTER_ADDR" in environment and not _parent_has("MASTER_ADDR"):
        return 0
    return None


def natural(variable: str) -> int | None:
    """Return the value of an environment variable as an integer >= 0; None if it is unset or anything else."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _parent_has(variable: str) -> bool:
    try:
        inherited = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(entry.startswith(variable.encode() + b"=") for entry in inherited)
