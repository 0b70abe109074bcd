"""Check that all ranks of a run see one run folder, because each writes its part of the checkpoints there."""

from __future__ import annotations

import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.files import writing

_PATIENCE_SECONDS = 60.0
"""Seconds that a file may take to appear on other nodes: caches of NFS hide new folders for up to a minute."""


def check_shared(folder: Path, runtime: Runtime) -> None:
    """Check that every rank sees a file that rank 0 writes to the run folder. Collective: call on every rank.

    Raises:
        UserError: on all ranks: rank 0 cannot write to the folder, or another rank does not see its file.
    """
    if runtime.world_size == 1:
        return
    probe = folder / f".shared-{runtime.broadcast_object(secrets.token_hex(16))}.tmp"
    with runtime.raise_on_all_ranks(), writing(folder, name=f"run_dir = {folder}"):
        if runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
    try:
        blind = runtime.gather_objects(None if _appears(probe) else socket.gethostname())
    finally:
        if runtime.is_main:
            with suppress(OSError):
                probe.unlink()
    ranks = [rank for rank, host in enumerate(blind) if host is not None]
    if ranks:
        raise UserError(
            f"run_dir = {folder}: rank {', '.join(map(str, ranks))} on {blind[ranks[0]]} does not see the files of "
            "rank 0, but each rank writes its part of a checkpoint there; set run_dir to a folder on storage that all "
            "nodes mount",
            everywhere=True,
        )


def _appears(probe: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
