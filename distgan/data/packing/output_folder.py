"""Create the output folder of a pack: it appears by one rename, and only files that pack wrote are removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from distgan.data.index.file import INDEX_NAME
from distgan.errors import UserError, printable
from distgan.files import DiskError, disk_errors, explained, publish_folder, reason, temporary_pattern, try_lock

HELD_OUT = "held-out"
"""Name of the subfolder with the shards of held-out samples."""
_OWN_NAME = re.compile(rf"shard-[0-9]{{6,}}\.tar|{re.escape(INDEX_NAME)}|{temporary_pattern(INDEX_NAME)}")


@contextlib.contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` at the end of the block, or is removed if the block raises.

    The yielded folder is `folder` with the suffix `.partial`, locked by this process. Files of a killed pack in it are
    removed. If `folder` is not free at the end of the block, the finished `.partial` folder stays.

    Args:
        folder: absolute path.
        overwrite: replace shards that pack wrote there.

    Raises:
        UserError: another pack is writing there, `folder` is not free (see `check_free`) at the start or at the end,
            or the disk is not writable.
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
    """Raise UserError unless `folder` is new or empty, or `overwrite` is set and it holds only files of pack."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: found a file, expected a folder; name a folder for the shards")
    if folder.is_mount():
        raise UserError(f"{folder}: found a mount point, which a rename cannot replace; name a folder inside it")
    if any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder}: the folder is not empty; name another folder, or add --overwrite")
        _check_only_shards(folder)
        if not (folder / INDEX_NAME).is_file():
            raise UserError(
                f"{folder}: cannot overwrite a folder without {INDEX_NAME}; remove it, or name another folder"
            )


def _check_only_shards(folder: Path) -> None:
    """Raise UserError if a folder holds files that pack did not write. Such a folder is never removed."""
    for path in sorted(folder.iterdir()):
        if path.name == HELD_OUT and path.is_dir() and not path.is_symlink():
            _check_only_shards(path)
        elif path.is_symlink() or not path.is_file() or not _OWN_NAME.fullmatch(path.name):
            raise UserError(
                f"{folder}: found {printable(path.name)}, which pack did not write; move it out of this folder"
            )


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """Yield an empty folder `DEST.partial`, locked by this process."""
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
    # Without file locks, the user must not run two packs there at the same time.
    with contextlib.suppress(OSError):
        if not try_lock(descriptor):
            raise UserError(f"{folder}: another pack is writing there; wait for it, or name another folder")


def _publish(partial: Path, folder: Path, overwrite: bool) -> None:
    """Rename the finished folder to `folder`, after checking again that it is free: a pack can take hours."""
    try:
        check_free(folder, overwrite=overwrite)
        publish_folder(partial, folder, replaced_as=_aside(folder) if overwrite else None)
    except (OSError, UserError) as error:
        why = error if isinstance(error, UserError) else f"{folder}: {reason(explained(error, folder))}"
        raise UserError(
            f"{why}; the shards are complete in {partial}: rename it before the next pack clears it"
        ) from None


def _aside(folder: Path) -> Path:
    """Return the folder that holds the old shards during the replacement."""
    return folder.with_name(f".{folder.name}.replaced")


def _settle(folder: Path) -> None:
    """Remove or restore old shards if a pack was killed during their replacement."""
    aside = _aside(folder)
    if not aside.exists():
        return
    _check_only_shards(aside)
    if (folder / INDEX_NAME).exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(folder)


def _clear(folder: Path) -> None:
    """Remove the files of a killed pack."""
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
