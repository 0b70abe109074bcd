"""The folder of shards that a pack makes: it appears whole, by one rename, and only what pack wrote is ever removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from distgan.data.index.file import INDEX_NAME
from distgan.errors import UserError, printable
from distgan.files import DiskError, disk_errors, explained, publish_folder, reason, try_lock

HELD_OUT = "held-out"
"""The folder inside it that holds, as a folder of shards of its own, what is not to be trained on."""
_OWN_NAME = re.compile(rf"shard-[0-9]{{6,}}\.tar|{re.escape(INDEX_NAME)}(\.[0-9]+-[0-9a-f]+\.tmp)?")


@contextlib.contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to write to, which becomes `folder` at the end of the block, or goes if that raises.

    It is `folder` with the ending `.partial`, held by this process alone; one that a killed pack has left is cleared.
    It also stays, finished, where `folder` cannot be had at the end of the block.

    Args:
        folder: absolute.
        overwrite: shards that pack wrote there are replaced.

    Raises:
        UserError: another pack is at work there, `folder` is not free (see `check_free`) at the start or at the end,
            or the disk cannot be written to.
    """
    with _disk_errors(folder), _partial(folder) as partial:
        try:
            _settle(folder)
            check_free(folder, overwrite=overwrite)
            with disk_errors(folder):
                yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _publish(partial, folder, overwrite)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError unless shards may be put there: into a new or empty folder, or over what pack wrote."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the shards")
    if folder.is_mount():
        raise UserError(f"{folder}: is a mount point, which cannot appear by a rename; name a folder inside it")
    if any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder}: is not empty; name another folder, or replace its shards with --overwrite")
        _check_only_shards(folder)
        if not (folder / INDEX_NAME).is_file():
            raise UserError(f"{folder}: has no {INDEX_NAME}, so it is not replaced; remove it, or name another folder")


def _check_only_shards(folder: Path) -> None:
    """Only folders that hold nothing but what `pack` writes are ever removed."""
    for path in sorted(folder.iterdir()):
        if path.name == HELD_OUT and path.is_dir() and not path.is_symlink():
            _check_only_shards(path)
        elif path.is_symlink() or not path.is_file() or not _OWN_NAME.fullmatch(path.name):
            raise UserError(
                f"{folder}: holds {printable(path.name)}, which pack did not write, and is not removed; move it away"
            )


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """An empty folder `DEST.partial`, held by this process alone."""
    partial = folder.with_name(folder.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, folder)
        _check_only_shards(partial)
        _clear(partial)
        yield partial
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    # On a file system without locks, packing there twice at once is the user's own care.
    with contextlib.suppress(OSError):
        if not try_lock(descriptor):
            raise UserError(f"{folder}: another pack is writing there; wait for it, or name another folder")


def _publish(partial: Path, folder: Path, overwrite: bool) -> None:
    """Let the finished folder appear; what is there may have changed in the hours since it was found free."""
    try:
        check_free(folder, overwrite=overwrite)
        publish_folder(partial, folder, replaced_as=_aside(folder) if overwrite else None)
    except (OSError, UserError) as error:
        why = error if isinstance(error, UserError) else f"{folder}: {reason(explained(error, folder))}"
        raise UserError(f"{why}; the shards are finished: rename {partial}, or the next pack clears it") from None


def _aside(folder: Path) -> Path:
    """Where old shards are while new ones take their place."""
    return folder.with_name(f".{folder.name}.replaced")


def _settle(folder: Path) -> None:
    """Remove old shards, or put them back, if a pack was killed while new ones took their place."""
    aside = _aside(folder)
    if not aside.exists():
        return
    _check_only_shards(aside)
    if (folder / INDEX_NAME).exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(folder)


def _clear(folder: Path) -> None:
    """Remove what a killed pack wrote."""
    for path in folder.iterdir():
        if path.name == HELD_OUT:
            _clear(path)
            path.rmdir()
        else:
            path.unlink()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        known = explained(error, folder)
        place = f" ({printable(str(error.filename))})" if error.filename and known is error else ""
        fix = "" if isinstance(known, DiskError) else "; name another folder"
        raise UserError(f"{folder}: cannot be written: {reason(known)}{place}{fix}") from None
