"""Files where they are, on local disks and in object stores: reads of byte ranges, downloads, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.callbacks

from distgan.data.locations import is_remote, public_name
from distgan.errors import UserError
from distgan.files import sync_file, sync_folder

_CONNECT_SECONDS, _READ_SECONDS = 30.0, 60.0


@lru_cache(maxsize=64)
def _filesystem(protocol: str, pid: int) -> Any:
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp  # only where HTTP is read: fsspec's default gives up on a shard after five minutes in all

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return fsspec.filesystem(protocol, use_listings_cache=False, **options)
    except ImportError as error:
        raise UserError(f"{protocol}://: {error}; install the package it names") from None


def filesystem(url: str) -> Any:
    """The fsspec filesystem of a URL, made anew in each process because they do not survive a fork."""
    return _filesystem(urlsplit(url).scheme.lower(), os.getpid())


class RemoteFile:
    """A remote file read by ranges: `size` in bytes, and bounded reads. All raise OSError."""

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._file = filesystem(url).open(url, "rb", cache_type="none", block_size=1 << 20)
        except Exception as error:  # each filesystem raises its own kinds
            raise _as_os_error(url, error) from error
        if not isinstance(self._file.size, int) or not self._file.seekable():
            raise OSError("the server does not offer byte ranges")
        self.size: int = self._file.size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end."""
        try:
            self._file.seek(start)
            return bytes(self._file.read(stop - start))
        except Exception as error:  # each filesystem raises its own kinds
            raise _as_os_error(self._url, error) from error

    def close(self) -> None:
        self._file.close()


def exists(url: str) -> bool:
    """Whether there is such a file; a remote one that cannot be reached counts as absent."""
    if not is_remote(url):
        return os.path.isfile(url)
    try:
        return bool(filesystem(url).exists(url))
    except Exception as error:  # each filesystem raises its own kinds
        _as_os_error(url, error)
        return False


def write(path: str, data: bytes) -> None:
    """Put a whole file in place, folder included: locally by a rename. Raises OSError."""
    if is_remote(path):
        try:
            filesystem(path).pipe_file(path, data)
        except Exception as error:  # each filesystem raises its own kinds
            raise _as_os_error(path, error) from error
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with publish(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def check_writable(path: str) -> None:
    """Raise OSError unless `write` could put a local file there; its folder is made."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tempfile.TemporaryFile(dir=os.path.dirname(path)).close()


@contextlib.contextmanager
def publish(path: str) -> Iterator[str]:
    """Yields a temporary path beside `path`; what was written there becomes `path` at once, or nothing does."""
    temporary = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(Path(path).parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def download(url: str, path: str, most: int) -> None:
    """Copy a remote file of at most `most` bytes to a local path, in one request where the store allows it.

    Raises OSError, also when there is more to it than that.
    """
    try:
        filesystem(url).get_file(url, path, callback=_Bound(url, most))
    except Exception as error:  # each filesystem raises its own kinds
        raise _as_os_error(url, error) from error


class _Bound(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Stops a download that is longer than it should be."""

    def __init__(self, url: str, most: int) -> None:
        super().__init__()
        self._url, self._most = url, most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._most:
            raise OSError(f"more than the {self._most:,} bytes expected")


def open_cache(folder: Path) -> None:
    """Make a cache's folder. Raises UserError unless this process can write files and lock them there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be used as a cache: {error.strerror or error}; name a folder on a disk of this node, "
            "which you may write to and whose file system has locks, with data.cache_dir or $DISTGAN_CACHE"
        ) from None


def fetch(url: str, folder: Path, most: int) -> str:
    """A local copy of a remote file in a cache's `folder`; its path. Raises OSError, and UserError as `open_cache`.

    Where the store names revisions (ETag), a node downloads each once, whichever of its processes asks first; elsewhere
    each download goes under the hash of what came. So no path ever has another content.
    """
    open_cache(folder)
    name, suffix = _revision(url), os.path.splitext(public_name(url))[1]
    if name is None:
        return _download_into(folder, url, most, None, suffix)
    path = folder / f"{name}{suffix}"
    with locked(path.with_suffix(".lock"), wait=True):
        return str(path) if path.exists() else _download_into(folder, url, most, name, suffix)


def _revision(url: str) -> str | None:
    """A name for what is there now, if the store tells it apart from what was there before."""
    try:
        said = filesystem(url).info(url)
    except Exception as error:  # each filesystem raises its own kinds
        raise _as_os_error(url, error) from error
    tag = said.get("ETag") or said.get("etag")
    return hashlib.sha256(f"{url}\n{tag}\n{said.get('size')}".encode()).hexdigest() if tag else None


def _download_into(folder: Path, url: str, most: int, name: str | None, suffix: str) -> str:
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as file:
        download(url, file.name, most)
        if name is None:
            with open(file.name, "rb") as downloaded:
                name = hashlib.file_digest(downloaded, "sha256").hexdigest()
        path = str(folder / f"{name}{suffix}")
        if not os.path.exists(path):
            with publish(path) as temporary:
                os.link(file.name, temporary)
    return path


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try for, or wait for, an exclusive lock on a file; yields whether it is held. A claim is removed afterwards."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held = False
    try:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its last holder may have removed the file: then others lock a newer one.
            held = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        yield held
    finally:
        if held and not wait:
            os.unlink(path)
        os.close(descriptor)


def _as_os_error(url: str, error: Exception) -> OSError:
    """What went wrong, in one line without the URL, whose query may be a secret."""
    if isinstance(error, UserError):
        raise error
    if isinstance(error, FileNotFoundError):  # fsspec's name for much of what a server may answer
        return OSError("not found, or no answer")
    text = " ".join(str(error).split()).replace(url, public_name(url))
    return OSError(text or type(error).__name__)
