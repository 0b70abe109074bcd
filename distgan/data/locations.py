"""Where shards are: local paths and URLs, patterns that name many of them, and reads of byte ranges.

Only ever whole files are named: a shell (`pipe:`) or a chain of filesystems (`a::b`) is refused, because data and
their indexes come from strangers.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import braceexpand
import fsspec
import fsspec.callbacks

from distgan.errors import UserError

PROTOCOLS = frozenset(
    ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "hdfs", "webhdfs", "oci", "oss")
)
_MAX_SHARDS = 1_000_000
_CONNECT_SECONDS, _READ_SECONDS = 30.0, 60.0
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def is_remote(url: str) -> bool:
    """Whether a normalised location is a URL rather than an absolute local path."""
    return _SCHEME.match(url) is not None


def normalise(url: str) -> str:
    """An absolute local path, or a URL of an accepted protocol. Raises UserError for anything else."""
    if not url.strip():
        raise UserError("the path of the shards is empty; name a folder of *.tar, a glob, a brace expansion or a URL")
    if url.strip().lower().startswith("pipe:"):
        raise UserError(f"{url}: `pipe:` would run a shell command and is never followed; give a path or URL of a tar")
    scheme = _SCHEME.match(url)
    if scheme is None and "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    protocol = scheme[1].lower() if scheme else ""
    if scheme and protocol == "file":
        return os.path.abspath(url[len(scheme[0]) :])
    if protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{public_name(url)}: this kind of URL is not read; accepted: {', '.join(sorted(PROTOCOLS))}")
    return url.rstrip("/")


def public_name(url: str) -> str:
    """The location as messages show it: without a query or password, which may be secrets."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def folder_of(url: str) -> str:
    """The parent folder of a normalised location."""
    path = public_name(url) if is_remote(url) else url
    return path.rpartition("/")[0] or "/"


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, both normalised or relative."""
    return f"{folder.rstrip('/')}/{name}"


def common_folder(urls: Sequence[str]) -> str:
    """The deepest folder that holds all of the given normalised locations ('' when they share none)."""
    split = [folder_of(url).split("/") for url in urls]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]
    folder = "/".join(shared)
    return folder if not is_remote(urls[0]) or len(shared) > 2 else ""


def relative_name(url: str, folder: str) -> str:
    """A location's name within a folder that holds it; the whole public name when the folder does not."""
    path, prefix = public_name(url), folder.rstrip("/") + "/"
    return path[len(prefix) :] if folder and path.startswith(prefix) else path


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


def expand(patterns: str | Sequence[str]) -> list[str]:
    """All shards that folders, globs, brace expansions, paths and URLs name: normalised, in order, none twice.

    Globs and folders are sorted by name. Raises UserError when one names nothing or a shard is named twice.
    """
    shards = [shard for pattern in _each(patterns) for shard in _expand_one(pattern)]
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise UserError(f"{public_name(shard)}: named twice; a shard counts once")
        seen.add(shard)
    folder = common_folder(shards)
    for shard in shards:
        if not relative_name(shard, folder).isprintable():
            raise UserError(f"{shard!a}: a name that cannot be printed, which an index does not hold; rename it")
    return shards


def _each(patterns: str | Sequence[str]) -> Iterator[str]:
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given:
        raise UserError("no shards: the list is empty; name a folder, a glob, a brace expansion, a path or a URL")
    for pattern in given:
        if not is_remote(pattern) and os.path.exists(pattern):
            yield pattern
            continue
        try:
            # A range is a list in full before its first name comes out.
            fits = all(_range_length(*match.groups()) <= _MAX_SHARDS for match in _RANGE.finditer(pattern))
            expanded = list(itertools.islice(_braces(pattern), _MAX_SHARDS + 1)) if fits else []
        except ValueError as error:
            raise UserError(f"{pattern}: not a valid brace expansion: {error}") from None
        if not fits or len(expanded) > _MAX_SHARDS:
            raise UserError(f"{pattern}: names more than {_MAX_SHARDS:,} shards")
        yield from expanded


def _range_length(first: str, last: str, step: str | None) -> int:
    return abs(int(last) - int(first)) // max(abs(int(step or 1)), 1) + 1


def _braces(pattern: str) -> Iterable[str]:
    return braceexpand.braceexpand(pattern, escape=False)


def _expand_one(pattern: str) -> list[str]:
    url = normalise(pattern)
    try:
        found = _list_remote(url) if is_remote(url) else _list_local(url)
    except OSError as error:
        raise UserError(f"{public_name(url)}: cannot be listed: {error.strerror or error}") from None
    if not found:
        raise UserError(f"{public_name(url)}: no tar found; name a folder of *.tar, a glob, a brace expansion or a URL")
    return found


def _list_local(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(".tar") and entry.is_file())
    if os.path.exists(path):
        return [path]
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def _list_remote(url: str) -> list[str]:
    protocol = urlsplit(url).scheme
    if protocol in ("http", "https"):
        if "*" in urlsplit(url).path:
            raise UserError(
                f"{public_name(url)}: HTTP servers cannot be listed; name the shards, for example with {{000..015}}"
            )
        return [url]
    pattern = url if "*" in url or url.endswith(".tar") else join(url, "*.tar")
    if "*" not in pattern:
        return [pattern]
    return [f"{protocol}://{path}" for path in sorted(filesystem(url).glob(pattern))]


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


@contextlib.contextmanager
def publish(path: str) -> Iterator[str]:
    """Yields a temporary path beside `path`; what was written there becomes `path` at once, or nothing does."""
    temporary = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
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


def fetch_by_content(url: str, folder: Path, most: int) -> str:
    """Download into `folder` under the hash of what came; the path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as file:
        download(url, file.name, most)
        with open(file.name, "rb") as downloaded:
            digest = hashlib.file_digest(downloaded, "sha256").hexdigest()
        path = str(folder / f"{digest}{os.path.splitext(public_name(url))[1]}")
        if not os.path.exists(path):
            with publish(path) as temporary:
                os.link(file.name, temporary)
    return path


def _as_os_error(url: str, error: Exception) -> OSError:
    """What went wrong, in one line without the URL, whose query may be a secret."""
    if isinstance(error, UserError):
        raise error
    if isinstance(error, FileNotFoundError):  # fsspec's name for much of what a server may answer
        return OSError("not found, or no answer")
    text = " ".join(str(error).split()).replace(url, public_name(url))
    return OSError(text or type(error).__name__)
