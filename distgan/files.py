"""Files and folders that appear whole or not at all, locks, reads with a bound on their size, and errors of disks."""

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
    """A file cannot be written for a reason that lies in its disk. The text is one line: cause, place and fix."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Raise what a disk refuses inside, where `path` is or is to be, as a DiskError. Other errors pass unchanged.

    Use it where nothing is cleaned up yet: a removed temporary file gives back the space that was lacking.
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
    """Raise any OSError inside as a UserError `NAME: cannot write WHAT: cause; fix`; NAME is by default the path."""
    try:
        yield
    except OSError as error:
        shown = path if name is None else name
        raise UserError(f"{shown}: cannot write {what}: {reason(explained(error, path))}") from None


def explained(error: OSError, path: Path | str) -> OSError:
    """A DiskError in place of what a disk refused at or below `path`; another error as it is."""
    if isinstance(error, DiskError) or error.errno not in _DISK_ERRORS:
        return error
    return DiskError(error.errno, _explanation(error, os.path.abspath(path)), os.fspath(path))


def is_disk_error(error: BaseException) -> bool:
    """Return True if an exception says that a local disk cannot be written to."""
    return isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in _DISK_ERRORS)


def reason(error: BaseException) -> str:
    """What an exception says, in one line; of an OSError without its number."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _explanation(error: OSError, path: str) -> str:
    cause = os.strerror(error.errno or 0)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{cause}: {path}; choose a place that you may write to"
    mount = path
    while not os.path.ismount(mount):
        mount = os.path.dirname(os.path.realpath(mount))
    if error.errno == errno.EROFS:
        return f"{cause}: {mount}; choose a place on a disk that can be written to"
    if error.errno == errno.EDQUOT:
        return f"{cause} on {mount}; remove files of yours there, or choose a place on another disk"
    disk = os.statvfs(path)
    if disk.f_files and not disk.f_favail:
        return (
            f"{cause}: {mount} has no inode left for another file (of {disk.f_files:,}); "
            "remove files there, or choose a place on another disk"
        )
    free, size = (blocks * disk.f_frsize / 1e6 for blocks in (disk.f_bavail, disk.f_blocks))
    return f"{cause}: {free:,.1f} of {size:,.1f} MB are free on {mount}; free more, or choose a place on another disk"


@contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there becomes `path` at once, or nothing does.

    A killed process leaves the old file or the new one. A symlink at `path` is replaced, not followed.

    Args:
        durable: wait until the file would survive a power cut too.

    Raises:
        OSError: see `disk_errors`; nothing is left behind.
    """
    # Other hosts may have a process of the same number.
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
        with suppress(OSError):  # a read-only disk refuses this too, and the first error tells more
            temporary.unlink()
        raise


def temporary_pattern(name: str) -> str:
    """Return a regular expression for the temporary files that killed processes leave beside a file of this name."""
    return rf"\.{re.escape(name)}\.[0-9]+-[0-9a-f]+\.tmp"


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by a new file with this content; see `new_file`."""
    with new_file(path, durable=durable) as temporary, open(temporary, "wb") as file:
        file.write(content)


def publish_folder(temporary: Path, folder: Path, *, replaced_as: Path | None = None) -> None:
    """Give a complete folder its name.

    Args:
        replaced_as: where a folder of that name steps aside to first; it is removed last. None replaces an empty folder
            only.

    Raises:
        OSError: it cannot be renamed; what was there has its name again.
    """
    aside = replaced_as if folder.exists() else None
    if aside is not None:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        temporary.rename(folder)  # over an empty folder, but never over a full one
    except OSError:
        if aside is not None:
            aside.rename(folder)
        raise
    sync_folder(folder.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def try_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Try for, or wait for, an exclusive lock on an open file. Returns False if another process holds it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try to lock a file exclusively, or wait for the lock; yield True if it is held.

    Without `wait`, the lock file is removed afterwards.
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
    """Write lines of text in UTF-8, whole or not at all, making the folder. Raises OSError."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(), durable=False)


def sync_file(path: Path | str) -> None:
    """Make what was written to a file survive a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make names that were added to, renamed in or removed from a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises UserError naming the file otherwise."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO must not hang the reader
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than the {limit} bytes that such a file can have")
    return content
