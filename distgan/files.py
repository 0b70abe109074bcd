"""Small files that are there whole or not at all, and small files read with a bound on their size."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from distgan.errors import UserError


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by a new file with this content; a killed process leaves the old one or the new one.

    A symlink at `path` is replaced, not followed. Raises OSError, and then leaves nothing behind.

    Args:
        durable: wait until the file would survive a power cut too.
    """
    # Other hosts may have a process of the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text in UTF-8, whole or not at all, making the folder. Raises OSError."""
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
