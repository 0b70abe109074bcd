"""Access files on local disks and in object stores: byte-range reads, downloads and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
import fsspec.callbacks

from distgan.data.storage.locations import is_http, is_remote, join, protocol_of, public_name, without_query
from distgan.data.storage.store_errors import StoreError, explain, missing_package
from distgan.errors import UserError
from distgan.files import (
    DiskError,
    disk_errors,
    explained,
    locked,
    new_file,
    reason,
    try_lock,
    write_atomically,
)

_CONNECT_SECONDS, _READ_SECONDS = 30.0, 60.0
_RETRIES = 3
_FIRST_BACKOFF_SECONDS = 0.5
_Result = TypeVar("_Result")


@lru_cache(maxsize=64)
def _filesystem(protocol: str, pid: int) -> Any:
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp  # imported only for HTTP; fsspec's default timeout ends every download after five minutes

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    return fsspec.filesystem(protocol, use_listings_cache=False, **options)


def filesystem(url: str) -> Any:
    """Return the fsspec filesystem of a URL. Each process has its own, because filesystems do not survive a fork.

    Raises UserError naming a missing package, and StoreError.
    """
    handled = sys.exception()
    try:
        return _filesystem(protocol_of(url), os.getpid())
    except ImportError as error:
        raise UserError(missing_package(url, error)) from None
    except Exception as error:  # each filesystem raises its own kinds
        raise explain(url, error, handled) from error


def ask(url: str, request: Callable[[Any], _Result], *, repeat: bool = False) -> _Result:
    """Run a request on the filesystem of a URL and return its result.

    Retries transient HTTP errors (see `StoreError`) 3 times, after 0.5, 1 and 2 seconds. The clients of object stores
    retry by themselves. Raises StoreError, DiskError, and UserError as in `filesystem`.

    Args:
        repeat: retry transient errors of all stores.
    """
    handled = sys.exception()
    for attempt in itertools.count():
        try:
            return request(filesystem(url))
        except (UserError, DiskError):
            raise
        except Exception as error:  # each filesystem raises its own kinds
            problem = explain(url, error, handled)
            if not (problem.transient and (repeat or is_http(url)) and attempt < _RETRIES):
                raise problem from error
        time.sleep(_FIRST_BACKOFF_SECONDS * 2**attempt)
    raise AssertionError


class RemoteFile:
    """A remote file with its `size` in bytes, read by byte ranges. All methods raise StoreError."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file = ask(url, lambda store: store.open(url, "rb", cache_type="none", block_size=1 << 20))
        if not isinstance(self._file.size, int) or not self._file.seekable():
            raise StoreError("the server does not support byte ranges; copy the shards to another server, or to a disk")
        self.size: int = self._file.size

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop), fewer at the end of the file."""

        def request(_: Any) -> bytes:
            self._file.seek(start)
            return bytes(self._file.read(stop - start))

        return ask(self._url, request)

    def close(self) -> None:
        self._file.close()


def kind_of(url: str) -> Literal["file", "directory"] | None:
    """Return the kind of the object at a location, or None if it does not exist. Raises OSError if a request fails."""
    if not is_remote(url):
        return "file" if os.path.isfile(url) else "directory" if os.path.isdir(url) else None
    try:
        return "directory" if ask(url, lambda store: store.info(url))["type"] == "directory" else "file"
    except StoreError as error:
        if error.status == 404:
            return None
        raise


def exists(url: str) -> bool:
    """Return True if the file exists. Raises UserError if a request fails."""
    try:
        return kind_of(url) == "file"
    except OSError as error:
        raise UserError(f"{public_name(url)}: cannot check whether this file exists: {reason(error)}") from None


def matching(folder: str, pattern: str) -> list[str]:
    """Return the files of a remote folder whose names match a pattern, sorted.

    `*` matches any part of a name, but not a leading dot. `**/` matches any number of folders. All other characters
    are literal, unlike in fsspec's own globs. Raises StoreError, also if the folder does not exist.
    """

    def names(store: Any) -> list[str]:
        if "/" in pattern or "**" in pattern:
            found = store.find(folder)
        else:
            found = [entry["name"] for entry in store.ls(folder, detail=True) if entry["type"] == "file"]
        first = len(store._strip_protocol(folder).rstrip("/")) + 1
        return sorted(name[first:] for name in found)

    expression = re.compile(_expression(pattern), re.DOTALL)
    return [join(folder, name) for name in ask(folder, names) if expression.fullmatch(name)]


def _expression(pattern: str) -> str:
    """Translate a pattern of names and folders into a regular expression."""
    *folders, last = pattern.split("/")
    if last == "**":
        folders, last = [*folders, "**"], "*"
    translated = ["(?:[^/.][^/]*/)*" if folder == "**" else f"{_part(folder)}/" for folder in folders]
    return "".join([*translated, _part(last)])


def _part(pattern: str) -> str:
    shown = r"(?!\.)" if pattern.startswith("*") else ""
    return shown + "[^/]*".join(re.escape(piece) for piece in re.split(r"\*+", pattern))


def write(path: str, data: bytes) -> None:
    """Write a whole file and create its folder. Local files appear by a rename. Raises OSError."""
    if is_remote(path):
        ask(path, lambda store: store.pipe_file(path, data))
        return
    with disk_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(Path(path), data)


def check_writable(path: str) -> None:
    """Raise OSError if `write` cannot write a local file at this path. Creates its folder."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    with disk_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        tempfile.TemporaryFile(dir=os.path.dirname(path)).close()


def download(url: str, path: str, most: int) -> None:
    """Copy a remote file of at most `most` bytes to a local path, in one request if the store supports it.

    Raises StoreError, also if the file is larger, and DiskError.
    """
    handled = sys.exception()
    try:
        get(filesystem(url), url, path, most)
    except (UserError, DiskError):
        raise
    except Exception as error:  # each filesystem raises its own kinds
        raise explain(url, error, handled) from error


def get(store: Any, url: str, path: str, most: int) -> None:
    try:
        store.get_file(url, path, callback=_Bound(most))
    except OSError as error:
        # Clients give numbers of the operating system to errors of servers too, but never a file or these.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        with disk_errors(path):
            raise


class _Bound(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Stop a download that exceeds its size limit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._most:
            raise OSError(f"wrong size: found more than the expected {self._most:,} bytes")


def open_cache(folder: Path) -> None:
    """Create a cache folder. Raises UserError if this process cannot write and lock files in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            try_lock(file.fileno())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot use this folder as a cache: {reason(explained(error, folder))}; set data.cache_dir or "
            "$DISTGAN_CACHE to a writable folder on a local disk that supports file locks"
        ) from None


def fetch(url: str, folder: Path, most: int) -> str:
    """Copy a remote file into a cache's `folder` and return the local path.

    If the store reports a revision (ETag), a node downloads each revision once. Otherwise each call downloads the file
    and names it by the hash of its content. The content of a path therefore never changes. Raises OSError, and
    UserError as in `open_cache`.
    """
    open_cache(folder)
    name, suffix = _revision(url), os.path.splitext(without_query(url))[1]
    if name is None:
        return _download_into(folder, url, most, None, suffix)
    path = folder / f"{name}{suffix}"
    with locked(path.with_suffix(".lock"), wait=True):
        return str(path) if path.exists() else _download_into(folder, url, most, name, suffix)


def _revision(url: str) -> str | None:
    """Return a name for the file's current revision, or None if the store reports no ETag."""
    said = ask(url, lambda store: store.info(url))
    tag = said.get("ETag") or said.get("etag")
    return hashlib.sha256(f"{url}\n{tag}\n{said.get('size')}".encode()).hexdigest() if tag else None


def _download_into(folder: Path, url: str, most: int, name: str | None, suffix: str) -> str:
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as file:
        ask(url, lambda store: get(store, url, file.name, most))
        if name is None:
            with open(file.name, "rb") as downloaded:
                name = hashlib.file_digest(downloaded, "sha256").hexdigest()
        path = str(folder / f"{name}{suffix}")
        if not os.path.exists(path):
            with new_file(Path(path)) as temporary:
                os.link(file.name, temporary)
    return path
