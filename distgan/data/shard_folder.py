"""The folder of shards that a pack makes: it appears whole, by one rename, and only what pack wrote is ever removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from distgan.data.index import INDEX_NAME
from distgan.data.layout import printable
from distgan.errors import UserError
from distgan.files import sync_folder

HELD_OUT = "held-out"
"""The folder inside it that holds, as a folder of shards of its own, what is not to be trained on."""
_OWN_NAME = re.compile(rf"shard-[0-9]{{6,}}\.tar|{re.escape(INDEX_NAME)}(\.[0-9]+-[0-9a-f]+\.tmp)?")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `folder` at the end of the block, or goes if that raises.

    It is `folder` with the ending `.partial`, held by this process alone; one that a killed pack has left is cleared.

    Args:
        folder: absolute, and free (see `check_free`); shards that it may hold are replaced.

    Raises:
        UserError: another pack is at work there, or the disk cannot be written to.
    """
    with _disk_errors(folder), _partial(folder) as partial:
        yield partial
        _publish(partial, folder)


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
    """An empty folder `DEST.partial`, held by this process alone and gone at the end unless it was renamed."""
    partial = folder.with_name(folder.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, folder)
        _check_only_shards(partial)
        _clear(partial)
        try:
            yield partial
        finally:
            if partial.exists():
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another pack is writing there; wait for it, or name another folder") from None
    except OSError:
        pass  # a file system without locks: packing there twice at once is the user's own care


def _publish(partial: Path, folder: Path) -> None:
    """Let the finished folder appear, in place of an empty one or of old shards that were to be replaced."""
    if folder.exists():
        _clear(folder)
    partial.rename(folder)
    sync_folder(folder.parent)


def _clear(folder: Path) -> None:
    """Remove what pack wrote. The index goes first: without it, what is left does not look finished."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != INDEX_NAME):
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
        place = f" ({printable(str(error.filename))})" if error.filename else ""
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}{place}; free space there, or name another folder"
        ) from None
