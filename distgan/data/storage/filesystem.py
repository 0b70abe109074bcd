"""Files where they are, on local disks and in object stores: reads of byte ranges, downloads, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
        import aiohttp  # only where HTTP is read: fsspec's default gives up on a shard after five minutes in all

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    return fsspec.filesystem(protocol, use_listings_cache=False, **options)


def filesystem(url: str) -> Any:
    """The fsspec filesystem of a URL, made anew in each process because they do not survive a fork.

    Raises UserError naming the package that is missing, and StoreError.
    """
    handled = sys.exception()
    try:
        return _filesystem(protocol_of(url), os.getpid())
    except ImportError as error:
        raise UserError(missing_package(url, error)) from None
    except Exception as error:  # each filesystem raises its own kinds
        raise explain(url, error, handled) from error


def _ask(url: str, request: Callable[[Any], _Result]) -> _Result:
    """The result of a request to the filesystem of a URL. Raises StoreError, DiskError, and UserError as `filesystem`.

    What an HTTP server fails at for now (see `StoreError`) is tried again 3 times, after 0.5, 1 and 2 seconds. The
    clients of object stores do so by themselves.
    """
    handled = sys.exception()
    for attempt in itertools.count():
        try:
            return request(filesystem(url))
        except (UserError, DiskError):
            raise
        except Exception as error:  # each filesystem raises its own kinds
            problem = explain(url, error, handled)
            if not (problem.transient and is_http(url) and attempt < _RETRIES):
                raise problem from error
        time.sleep(_FIRST_BACKOFF_SECONDS * 2**attempt)
    raise AssertionError


class RemoteFile:
    """A remote file read by ranges: `size` in bytes, and bounded reads. All raise StoreError."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file = _ask(url, lambda store: store.open(url, "rb", cache_type="none", block_size=1 << 20))
        if not isinstance(self._file.size, int) or not self._file.seekable():
            raise StoreError("the server does not offer byte ranges; copy the shards to another one, or to a disk")
        self.size: int = self._file.size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end."""

        def request(_: Any) -> bytes:
            self._file.seek(start)
            return bytes(self._file.read(stop - start))

        return _ask(self._url, request)

    def close(self) -> None:
        self._file.close()


def kind_of(url: str) -> Literal["file", "directory"] | None:
    """What there is by that name; None if there is nothing. Raises OSError when a store does not tell."""
    if not is_remote(url):
        return "file" if os.path.isfile(url) else "directory" if os.path.isdir(url) else None
    try:
        return "directory" if _ask(url, lambda store: store.info(url))["type"] == "directory" else "file"
    except StoreError as error:
        if error.status == 404:
            return None
        raise


def exists(url: str) -> bool:
    """Whether there is such a file. Raises UserError when a store does not tell."""
    try:
        return kind_of(url) == "file"
    except OSError as error:
        raise UserError(f"{public_name(url)}: cannot tell whether this file exists: {reason(error)}") from None


def matching(folder: str, pattern: str) -> list[str]:
    """The files of a remote folder whose names match, sorted: `*` stands for any part of a name, `**/` for any folders.

    Everything else stands for itself, other than in fsspec's own globs. A leading `*` does not match a leading dot.
    Raises StoreError, also when there is no such folder.
    """

    def names(store: Any) -> list[str]:
        if "/" in pattern or "**" in pattern:
            found = store.find(folder)
        else:
            found = [entry["name"] for entry in store.ls(folder, detail=True) if entry["type"] == "file"]
        first = len(store._strip_protocol(folder).rstrip("/")) + 1
        return sorted(name[first:] for name in found)

    expression = re.compile(_expression(pattern), re.DOTALL)
    return [join(folder, name) for name in _ask(folder, names) if expression.fullmatch(name)]


def _expression(pattern: str) -> str:
    """A regular expression for what a pattern of names and folders matches."""
    *folders, last = pattern.split("/")
    if last == "**":
        folders, last = [*folders, "**"], "*"
    translated = ["(?:[^/.][^/]*/)*" if folder == "**" else f"{_part(folder)}/" for folder in folders]
    return "".join([*translated, _part(last)])


def _part(pattern: str) -> str:
    shown = r"(?!\.)" if pattern.startswith("*") else ""
    return shown + "[^/]*".join(re.escape(piece) for piece in re.split(r"\*+", pattern))


def write(path: str, data: bytes) -> None:
    """Put a whole file in place, folder included: locally by a rename. Raises OSError."""
    if is_remote(path):
        _ask(path, lambda store: store.pipe_file(path, data))
        return
    with disk_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(Path(path), data)


def check_writable(path: str) -> None:
    """Raise OSError unless `write` could put a local file there; its folder is made."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    with disk_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        tempfile.TemporaryFile(dir=os.path.dirname(path)).close()


def download(url: str, path: str, most: int) -> None:
    """Copy a remote file of at most `most` bytes to a local path, in one request where the store allows it.

    Raises StoreError, also when there is more to it than that, and DiskError.
    """
    handled = sys.exception()
    try:
        _get(filesystem(url), url, path, most)
    except (UserError, DiskError):
        raise
    except Exception as error:  # each filesystem raises its own kinds
        raise explain(url, error, handled) from error


def _get(store: Any, url: str, path: str, most: int) -> None:
    try:
        store.get_file(url, path, callback=_Bound(most))
    except OSError as error:
        # Clients give numbers of the operating system to errors of servers too, but never a file or these.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        with disk_errors(path):
            raise


class _Bound(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Stops a download that is longer than it should be."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._most:
            raise OSError(f"more than the {self._most:,} bytes expected")


def open_cache(folder: Path) -> None:
    """Make a cache's folder. Raises UserError unless this process can write files and lock them there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            try_lock(file.fileno())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be used as a cache: {reason(explained(error, folder))}; name a folder on a disk of this "
            "node, which you may write to and whose file system has locks, with data.cache_dir or $DISTGAN_CACHE"
        ) from None


def fetch(url: str, folder: Path, most: int) -> str:
    """A local copy of a remote file in a cache's `folder`; its path. Raises OSError, and UserError as `open_cache`.

    Where the store names revisions (ETag), a node downloads each once, whichever of its processes asks first; elsewhere
    each download goes under the hash of what came. So no path ever has another content.
    """
    open_cache(folder)
    name, suffix = _revision(url), os.path.splitext(without_query(url))[1]
    if name is None:
        return _download_into(folder, url, most, None, suffix)
    path = folder / f"{name}{suffix}"
    with locked(path.with_suffix(".lock"), wait=True):
        return str(path) if path.exists() else _download_into(folder, url, most, name, suffix)


def _revision(url: str) -> str | None:
    """A name for what is there now, if the store tells it apart from what was there before."""
    said = _ask(url, lambda store: store.info(url))
    tag = said.get("ETag") or said.get("etag")
    return hashlib.sha256(f"{url}\n{tag}\n{said.get('size')}".encode()).hexdigest() if tag else None


def _download_into(folder: Path, url: str, most: int, name: str | None, suffix: str) -> str:
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as file:
        _ask(url, lambda store: _get(store, url, file.name, most))
        if name is None:
            with open(file.name, "rb") as downloaded:
                name = hashlib.file_digest(downloaded, "sha256").hexdigest()
        path = str(folder / f"{name}{suffix}")
        if not os.path.exists(path):
            with new_file(Path(path)) as temporary:
                os.link(file.name, temporary)
    return path


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try for, or wait for, an exclusive lock on a file; yields whether it is held. A claim is removed afterwards."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held = False
    try:
        with contextlib.suppress(FileNotFoundError):
            # Its last holder may have removed the file: then others lock a newer one.
            held = try_lock(descriptor, wait=wait) and os.stat(path).st_ino == os.fstat(descriptor).st_ino
        yield held
    finally:
        if held and not wait:
            os.unlink(path)
        os.close(descriptor)
