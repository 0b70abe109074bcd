"""Find a checkpoint of a run in an object store, and copy it to the cache of this node."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from pathlib import Path

from distgan.checkpoint.directory import JSON_LIMIT
from distgan.checkpoint.remote import RemoteCheckpoints, file_name, step_of
from distgan.config.fields import run_location
from distgan.data.storage.locations import public_name
from distgan.data.storage.objects import ObjectFolder
from distgan.errors import UserError
from distgan.files import cache_folder, explained, locked, reason

logger = logging.getLogger("distgan")

_KEPT_SECONDS = 24 * 3600
_CHECKPOINT = re.compile(r"(.+)/checkpoints/([^/]+)")


def is_url(source: str | os.PathLike[str]) -> bool:
    """Return True if a run or checkpoint is given by a URL."""
    return isinstance(source, str) and "://" in source


def checkpoint_url(source: str, name: str) -> str:
    """Return the URL of the checkpoint `name` of the run that a URL is about."""
    return f"{_divided(source)[0]}/checkpoints/{name}"


def download(source: str, *, best: bool = False) -> Path:
    """Return the local copy of a checkpoint in an object store, or of a run's newest or best one.

    Copies lie in the folder `checkpoints` of the cache. Those that nothing has asked for since a day are removed when
    another one of the run is fetched. No process group is needed: processes of a node wait for each other.

    Raises:
        UserError: there is no valid checkpoint, or the store cannot be read, or the cache cannot be written.
    """
    url, step = _divided(source)
    if step is not None and best:
        raise UserError(f"{source}: --best needs the URL of a run, found a single checkpoint; remove --best")
    folder = cache_folder(None) / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(folder / ".lock", wait=True):
            path = _fetch(RemoteCheckpoints(ObjectFolder(url)), folder, step, best)
            os.utime(path)
            for other in folder.glob("step-*"):
                if other != path and time.time() - other.stat().st_mtime > _KEPT_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
            return path
    except OSError as error:
        raise UserError(
            f"{public_name(source)}: cannot fetch a checkpoint: {reason(explained(error, folder))}"
        ) from None


def fetch_state(url: str, folder: Path) -> bool:
    """Copy state.json of a run's newest checkpoint to a folder. Return False if the run has none. Raises UserError."""
    remote = RemoteCheckpoints(ObjectFolder(url))
    try:
        found = next(iter(remote.complete().values()), None)
        if found is not None:
            remote.objects.download(file_name(found.name, "state.json"), folder / "state.json", JSON_LIMIT)
    except OSError as error:
        raise UserError(f"{public_name(url)}: cannot read the newest checkpoint: {reason(error)}") from None
    return found is not None


def _fetch(remote: RemoteCheckpoints, folder: Path, step: int | None, best: bool) -> Path:
    run, complete = public_name(remote.objects.url), remote.complete()
    if best:
        mark = remote.best()
        if mark is None:
            raise UserError(f"{run}: --best: no checkpoint is marked as the best; train with evaluation.every")
        step = mark.step
    if step is not None:
        if step not in complete:
            raise UserError(f"{run}: has no complete checkpoint of step {step}; it has {sorted(complete)}")
        return remote.fetch(complete[step], folder)
    for found in complete.values():
        try:
            return remote.fetch(found, folder)
        except UserError as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
    raise UserError(f"{run}: no valid checkpoint; train the run until its first checkpoint, or correct the URL")


def _divided(source: str) -> tuple[str, int | None]:
    """Return the URL of a run, and the step of its checkpoint if the URL is that of one."""
    try:
        location = run_location(source)
    except ValueError as error:
        raise UserError(str(error)) from None
    match = _CHECKPOINT.fullmatch(location)
    step = step_of(match[2]) if match else None
    return (match[1], step) if match and step is not None else (location, None)
