"""Checks of a run's folders: shared by all nodes, with enough free space."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

from distgan.config import Config
from distgan.data.storage.locations import public_name
from distgan.data.storage.objects import ObjectFolder
from distgan.distributed.runtime import Runtime
from distgan.doctor.finding import Finding
from distgan.errors import UserError
from distgan.files import cache_folder, explained, reason, try_lock

_PATIENCE_SECONDS = 10.0
_LATE_SECONDS = 1.0
_ROOM = 10e9


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or its nearest existing parent."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def shared_folder(runtime: Runtime, folder: Path, probe: str) -> list[Finding]:
    """Check that all ranks see files of rank 0 in the folder, and how soon. Collective: call on every rank.

    Args:
        probe: name of a folder to create in it; the caller removes it.
    """
    place, findings, refusal = folder / probe, [], None
    if runtime.is_main:
        try:
            place.mkdir()
            (place / "from-rank-0").write_text(probe)
            findings.append(_locks(place / "lock"))
        except OSError as error:
            refusal = f"run_dir = {folder}: cannot write to it: {reason(explained(error, folder))}"
    refusal = runtime.broadcast_object(refusal)
    if refusal is not None:
        return [Finding("FAILED", "run folder", refusal)]
    seen = _wait_for(place / "from-rank-0", probe)
    complaint = None
    if seen is None:
        complaint = "cannot read rank 0's files in"
    elif not runtime.is_main:
        try:
            (place / f"from-rank-{runtime.rank}").write_text(probe)
        except OSError as error:
            complaint = f"cannot write ({error.strerror}) to"
    complaints = runtime.gather_objects(complaint)
    late = max(runtime.gather_objects(seen or 0.0))
    if runtime.is_main:
        for rank in range(1, runtime.world_size):
            back = None if complaints[rank] else _wait_for(place / f"from-rank-{rank}", probe)
            if complaints[rank] is None and back is None:
                complaints[rank] = "has a folder of its own, not rank 0's, at"
            late = max(late, back or 0.0)
    complaints, late = runtime.broadcast_object((complaints, late))
    wrong = [rank for rank, text in enumerate(complaints) if text]
    if wrong:
        hosts = runtime.gather_objects(socket.gethostname())
        where = f"rank {wrong[0]} on {hosts[wrong[0]]}"
        text = f"{where} {complaints[wrong[0]]} {folder}; set run_dir to a folder on storage that all nodes mount"
        return [*findings, Finding("FAILED", "run folder", text)]
    if late > _LATE_SECONDS:
        text = f"{folder}: other ranks see new files only after {late:.1f} s; "
        return [*findings, Finding("warning", "run folder", text + "shorten NFS attribute caching, or train as it is")]
    return [*findings, Finding("ok", "run folder", f"{folder} is the same on all ranks")]


def object_store(url: str, probe: str) -> list[Finding]:
    """Check that this process can write, list and remove objects below the URL of a run.

    Args:
        probe: name of an object to create in it.
    """
    objects = ObjectFolder(url)
    try:
        exclusive = objects.try_exclusive(f"{probe}/probe")
        objects.write(f"{probe}/probe", probe.encode())
        seen = objects.names(probe)
        objects.remove([f"{probe}/probe"])
    except (OSError, UserError) as error:
        return [Finding("FAILED", "run folder", f"run_dir = {public_name(url)}: cannot use it: {reason(error)}")]
    if not exclusive:
        text = f"{public_name(url)}: this store has no conditional writes; never start two jobs within some seconds"
        return [Finding("warning", "run folder", text)]
    return [Finding("ok", "run folder", f"{public_name(url)} takes, lists ({len(seen)}) and removes objects")]


def room(folder: Path, *, checkpoint: int = 0, keep: int = 0) -> Finding:
    """Check that the disk has room for `keep` checkpoints and two more, of `checkpoint` bytes each."""
    free = shutil.disk_usage(folder).free
    needed = (keep + 2) * checkpoint
    said = f"{free / 1e9:.1f} GB free in {folder}"
    if checkpoint:
        said += f"; checkpoints of {checkpoint / 1e6:.1f} MB take {needed / 1e9:.2f} GB"
    if free < needed:
        return Finding("FAILED", "free disk", f"{said}; free some, or choose another run_dir")
    if free < max(_ROOM, 2 * needed):
        return Finding("warning", "free disk", f"{said}; free some, because a full disk loses checkpoints")
    return Finding("ok", "free disk", said)


def shard_cache(config: Config) -> Finding:
    """Check that this node has room for the shard cache."""
    folder = cache_folder(config.data.cache_dir)
    wanted = config.data.cache_gigabytes
    cached = sum(file.stat().st_size for file in (folder / "shards").glob("*.tar"))
    free = (shutil.disk_usage(nearest_folder(folder)).free + cached) / 1e9
    if free < wanted:
        fix = "lower data.cache_gigabytes, or set data.cache_dir to a folder on a larger local disk"
        return Finding("FAILED", "shard cache", f"{folder}: found {free:.1f} GB of room, expected {wanted:g} GB; {fix}")
    return Finding("ok", "shard cache", f"{folder} has room for {wanted:g} GB")


def _wait_for(file: Path, content: str) -> float | None:
    """Return the seconds until the file has this content; None after the time limit."""
    started = time.monotonic()
    while time.monotonic() - started < _PATIENCE_SECONDS:
        try:
            if file.read_text() == content:
                return time.monotonic() - started
        except OSError:
            pass
        time.sleep(0.02)
    return None


def _locks(file: Path) -> Finding:
    try:
        with open(file, "w") as lock:
            try_lock(lock.fileno())
    except OSError:
        text = f"{file.parent.parent}: the file system has no locks; never start two jobs with the same run_dir"
        return Finding("warning", "locks", text)
    return Finding("ok", "locks", "a second job with the same run_dir will be refused")
