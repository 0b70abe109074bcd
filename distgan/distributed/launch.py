"""What a launcher tells each of its processes in the environment, against what came of it, and how one leaves.

Light, because every command asks it before anything slow is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distgan.errors import UserError


def is_first(rank: str) -> bool:
    """Whether the launcher made this the first process, of all (`RANK`) or of its machine (`LOCAL_RANK`)."""
    alone = natural("WORLD_SIZE") in (None, 0, 1)
    return alone or os.environ.get(rank, "0") in ("", "0")


def check_launch() -> None:
    """Refuse an environment that promises other processes without saying how to find them. Raises UserError."""
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
            f"WORLD_SIZE={world_size} in the environment, but no {', '.join(missing)}; {fix}", everywhere=True
        )
    rank = natural("RANK")
    if world_size > 1 and (rank is None or rank >= world_size):
        raise UserError(
            f"RANK={os.environ['RANK'][:80]!r} in the environment: expected a number below WORLD_SIZE={world_size}; "
            + fix
        )


def leave(status: int) -> None:
    """Exit now when other ranks may be waiting: an orderly shutdown of a process group would wait for them too."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def refuse_half_precision() -> None:
    """Refuse an accelerate config that asks for what the recipe cannot either. Raises UserError."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("fp16", "fp8"):
        raise UserError(
            f"the accelerate config asks for mixed_precision: {asked}, in which gradient penalties and BN statistics "
            "overflow; leave it at `no` there, and set training.mixed_precision: bf16 in the recipe",
            everywhere=True,
        )


def check_world_size(world_size: int) -> None:
    """Refuse to run as one of several jobs where the launcher promised one of several processes. Raises UserError."""
    promised = _promised_world_size()
    if promised is not None and promised != world_size:
        raise UserError(
            f"the launcher promised {promised or 'several'} processes, but each runs alone (world size {world_size}); "
            "use `accelerate launch --multi_gpu --num_processes N -m distgan ...` (also on machines without a GPU) "
            "or `torchrun --nproc-per-node N -m distgan ...`",
            everywhere=True,
        )


def _promised_world_size() -> int | None:
    """What the environment says the world size is: None if nothing, 0 if more than one without a number."""
    environment = os.environ
    if (world_size := natural("WORLD_SIZE")) is not None:
        return world_size
    # `srun python -m distgan` with several tasks and no launcher in between.
    tasks = natural("SLURM_STEP_NUM_TASKS")
    if "SLURM_STEP_ID" in environment and tasks is not None and tasks > 1:
        return tasks
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves a master address as the only trace.
    from_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if from_accelerate and "MASTER_ADDR" in environment and not _parent_has("MASTER_ADDR"):
        return 0
    return None


def natural(variable: str) -> int | None:
    """A whole number in the environment; None for anything else."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _parent_has(variable: str) -> bool:
    try:
        inherited = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(entry.startswith(variable.encode() + b"=") for entry in inherited)
