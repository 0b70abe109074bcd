"""What a launcher tells each of its processes in the environment, and how one of them leaves."""

from __future__ import annotations

import os
import sys

from distgan.errors import UserError


def is_first(rank: str) -> bool:
    """Whether the launcher made this the first process, of all (`RANK`) or of its machine (`LOCAL_RANK`)."""
    alone = _natural("WORLD_SIZE") in (None, 0, 1)
    return alone or os.environ.get(rank, "0") in ("", "0")


def _natural(variable: str) -> int | None:
    """A whole number in the environment; None for anything else."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def check_launch() -> None:
    """Refuse an environment that promises other processes without saying how to find them. Raises UserError."""
    if "WORLD_SIZE" not in os.environ:
        return
    fix = "unset it, or start with `accelerate launch` or `torchrun`"
    world_size = _natural("WORLD_SIZE")
    if not world_size:
        found = os.environ["WORLD_SIZE"][:80]
        raise UserError(f"WORLD_SIZE={found!r} in the environment: expected a number of processes; {fix}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={world_size} in the environment, but no {', '.join(missing)}; {fix}", everywhere=True
        )
    rank = _natural("RANK")
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
