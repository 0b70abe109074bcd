"""What the launcher promised, against what came of it."""

from __future__ import annotations

import os
from pathlib import Path

from distgan.errors import UserError


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
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    # `srun python -m distgan` with several tasks and no launcher in between.
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return int(environment["SLURM_STEP_NUM_TASKS"])
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves a master address as the only trace.
    from_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if from_accelerate and "MASTER_ADDR" in environment and not _parent_has("MASTER_ADDR"):
        return 0
    return None


def _parent_has(variable: str) -> bool:
    try:
        inherited = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(entry.startswith(variable.encode() + b"=") for entry in inherited)
