"""Atomic writes of files and folders, file locks, bounded reads, and messages for disk errors."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distgan.errors import UserError

_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM))


class DiskError(OSError):
    """A file cannot be written because of its disk or its permissions. The text is one line: cause, place and fix."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Context manager that turns disk errors into a DiskError about the file system of `path`.

    `path` need not exist. Other exceptions pass unchanged. Enter it inside the code that cleans up: the message gives
    the free space, and removing a temporary file first would change it.
    """
    try:
        yield
    except OSError as error:
        known = explained(error, path)
        if known is error:
            raise
        raise known from error


@contextmanager
def writing(path: Path | str, what: str = "there", *, name: object = None) -> Iterator[None]:
    """Context manager that turns any OSError into the UserError `NAME: cannot write WHAT: cause; fix`.

    Args:
        path: where the block writes; need not exist.
        what: noun for what is written.
        name: key, option or file that the message begins with; `path` if None.
    """
    try:
        yield
    except OSError as error:
        shown = path if name is None else name
        raise UserError(f"{shown}: cannot write {what}: {reason(explained(error, path))}") from None


def explained(error: OSError, path: Path | str) -> OSError:
    """Return a DiskError if the disk of `path` or the permissions caused the error; otherwise return the error."""
    if isinstance(error, DiskError) or error.errno not in _DISK_ERRORS:
        return error
    return DiskError(error.errno, _explanation(error, os.path.abspath(path)), os.fspath(path))


def is_disk_error(error: BaseException) -> bool:
    """Return True if a local disk or its permissions caused the exception."""
    return isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in _DISK_ERRORS)


def reason(error: BaseException) -> str:
    """Return the message of an exception on one line, without the error number and file name of an OSError."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _explanation(error: OSError, path: str) -> str:
    cause = os.strerror(error.errno or 0)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{cause}: {path}; choose a folder that you may write to"
    mount = path
    while not os.path.ismount(mount):
        mount = os.path.dirname(os.path.realpath(mount))
    if error.errno == errno.EROFS:
        return f"{cause}: {mount}; choose a folder on a writable disk"
    if error.errno == errno.EDQUOT:
        return f"{cause} on {mount}; remove some of your files there, or choose a folder on another disk"
    disk = os.statvfs(path)
    if disk.f_files and not disk.f_favail:
        return (
            f"{cause}: {mount} has no inode left for another file (of {disk.f_files:,}); "
            "remove files there, or choose a folder on another disk"
        )
    free, size = (blocks * disk.f_frsize / 1e6 for blocks in (disk.f_bavail, disk.f_blocks))
    return f"{cause}: {free:,.1f} of {size:,.1f} MB are free on {mount}; free more, or choose a folder on another disk"


@contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Context manager that replaces `path` atomically: write the file to the temporary path that it yields.

    After a crash, `path` is the old file or the complete new one. A symlink at `path` is replaced, not followed.

    Args:
        durable: sync the file and its folder, so that the new file also survives a power cut.

    Raises:
        OSError: the file cannot be written; see `disk_errors`. The temporary file is removed if the disk allows it.
    """
    # A random suffix, because a process on another host may have the same ID.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            if durable:
                sync_file(temporary)
            os.replace(temporary, path)
            if durable:
                sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # keep the first error, which has the cause
            temporary.unlink()
        raise


def temporary_pattern(name: str) -> str:
    """Return a regular expression for the temporary files that killed processes left beside the file `name`."""
    return rf"\.{re.escape(name)}\.[0-9]+-[0-9a-f]+\.tmp"


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` to `path` atomically; see `new_file`."""
    with new_file(path, durable=durable) as temporary, open(temporary, "wb") as file:
        file.write(content)


def publish_folder(temporary: Path, folder: Path, *, replaced_as: Path | None = None) -> None:
    """Rename the complete folder `temporary` to `folder`, and sync the parent folder.

    Args:
        replaced_as: path on the same file system. An existing `folder` moves there first and is deleted at the end.
            If None, `folder` must be missing or empty.

    Raises:
        OSError: the folder cannot be renamed. An existing `folder` is moved back.
    """
    aside = replaced_as if folder.exists() else None
    if aside is not None:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        temporary.rename(folder)  # fails if the target is a folder with content
    except OSError:
        if aside is not None:
            aside.rename(folder)
        raise
    sync_folder(folder.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def try_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file exclusively. Return False if another process holds the lock.

    Args:
        wait: wait for the lock instead of returning False.

    Raises:
        OSError: the file system does not support locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try to lock a file exclusively, or wait for the lock; yield True if it is held.

    Without `wait`, the lock file is removed afterward.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held = False
    try:
        with suppress(FileNotFoundError):
            # Its last holder may have removed the file: then others lock a newer one.
            held = try_lock(descriptor, wait=wait) and os.stat(path).st_ino == os.fstat(descriptor).st_ino
        yield held
    finally:
        if held and not wait:
            os.unlink(path)
        os.close(descriptor)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of UTF-8 text atomically; create the folder if needed.

    Raises:
        OSError: the file cannot be written; see `disk_errors`.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(), durable=False)


def sync_file(path: Path | str) -> None:
    """Sync a file, so that its content survives a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that additions, renames and removals in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a file.

    Raises:
        UserError: the file cannot be read, or has more than `limit` bytes.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a FIFO must not block
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit} bytes, the limit for this file")
    return content


def cache_folder(configured: str | None) -> Path:
    """The node-local cache: as configured, else ``$DISTGAN_CACHE``, else ``~/.cache/distgan``.

    Raises:
        UserError: it lies in a home folder, and this user has none.
    """
    try:
        return Path(configured or os.environ.get("DISTGAN_CACHE") or Path.home() / ".cache" / "distgan").expanduser()
    except RuntimeError:
        raise UserError(
            "the cache folder lies in a home folder, and this user has none; set DISTGAN_CACHE to a writable folder"
        ) from None
