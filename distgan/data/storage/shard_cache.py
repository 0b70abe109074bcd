"""Cache remote shards in a node-local folder of bounded size that all processes of the node share.

A shard's file name is a hash of its whole URL and its index entry, so that different shards or versions never share a
file. A rename publishes each file whole. Processes coordinate by `flock`, which the kernel releases when a process
dies:

- The process that downloads KEY locks `KEY.claim`; the other processes wait.
- A process holds `lock` briefly while it renames a download, and while it makes room. Making room removes finished
  shards, least recently used first, and partial downloads of dead processes. A `KEY-SIZE.part` counts with its full
  size as soon as it exists.

An evicted shard stays readable for a process that has it open. Its next use downloads it again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from distgan.config import DataConfig
from distgan.data.index.table import Shard
from distgan.data.storage import filesystem
from distgan.files import DiskError, cache_folder, disk_errors, locked

_POLL_SECONDS = 0.02
_WAIT_SECONDS = 300.0


class ShardCache:
    """One process's handle to the cache; safe to use from several threads and processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    @classmethod
    def of(cls, config: DataConfig) -> ShardCache:
        """Open the cache that a run's config names. Raises UserError if its folder cannot be used."""
        folder = cache_folder(config.cache_dir) / "shards"
        filesystem.open_cache(folder)
        return cls(folder, int(config.cache_gigabytes * 1e9))

    def open(self, shard: Shard) -> int:
        """Return a read-only file descriptor of the whole shard, downloaded if necessary. The caller closes it.

        Raises OSError if the download fails, the size or hash differs from the index, or the cache has no room.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        path = self._path(shard)
        while True:
            descriptor = self._open_finished(path, shard)
            if descriptor is None:
                descriptor = self._download(path, shard)
            if descriptor is not None:
                return descriptor
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"another process is still downloading it after {_WAIT_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)

    def touch(self, shards: Iterable[Shard]) -> None:
        """Mark shards as recently used, so that other shards are evicted first."""
        for shard in shards:
            with contextlib.suppress(OSError):
                os.utime(self._path(shard))

    def _path(self, shard: Shard) -> Path:
        identity = f"{shard.url}\n{shard.size}\n{shard.header_digest}\n{shard.sha256}"
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:40]}.tar"

    def _open_finished(self, path: Path, shard: Shard) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == shard.size:
            with contextlib.suppress(OSError):  # a read-only disk can still be read
                os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None

    def _download(self, path: Path, shard: Shard) -> int | None:
        """Download a shard and return its file descriptor, or None if another process is downloading it."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(path.with_suffix(".claim")) as claimed:
                return self._download_claimed(path, shard) if claimed and not path.exists() else None

    def _download_claimed(self, path: Path, shard: Shard) -> int:
        part = path.with_name(f"{path.stem}-{shard.size}.part")
        try:
            with disk_errors(self._folder):
                self._reserve(part, shard)
                filesystem.download(shard.url, str(part), shard.size)
                _check(part, shard)
                with ExitStack() as unless_published:
                    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                    unless_published.callback(os.close, descriptor)
                    os.fsync(descriptor)
                    # A process that makes room lists the folder, and could miss a file that is renamed meanwhile.
                    with locked(self._folder / "lock", wait=True):
                        os.rename(part, path)
                    unless_published.pop_all()
                return descriptor
        finally:
            with contextlib.suppress(OSError):
                part.unlink()

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Evict least recently used shards until the full size fits, then create the empty part."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            with locked(self._folder / "lock", wait=True):
                if self._make_room(shard.size):
                    part.touch()
                    return
            if shard.size > self._max_bytes or time.monotonic() > deadline:
                raise DiskError(
                    errno.ENOSPC,
                    f"no room for {shard.size:,} bytes in {self._folder}; raise data.cache_gigabytes",
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, size: int) -> bool:
        finished: list[tuple[float, int, str]] = []
        used = size
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError, ValueError):
                if entry.name.endswith(".tar"):
                    status = entry.stat()
                    finished.append((status.st_mtime, status.st_size, entry.path))
                    used += status.st_size
                elif entry.name.endswith(".part"):
                    key, _, reserved = entry.name.removesuffix(".part").rpartition("-")
                    with locked(self._folder / f"{key}.claim") as abandoned:
                        if abandoned:
                            os.unlink(entry.path)
                        else:
                            used += int(reserved)
        if used - sum(size for _, size, _ in finished) > self._max_bytes:
            return False  # emptying the cache would not help
        for _, freed, name in sorted(finished):
            if used <= self._max_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            used -= freed
        return used <= self._max_bytes


def _check(part: Path, shard: Shard) -> None:
    size = part.stat().st_size
    if size != shard.size:
        raise OSError(
            f"wrong size: found {size:,} bytes, expected {shard.size:,}; run `distgan index` again if the shard changed"
        )
    if shard.sha256 is not None:
        with part.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise OSError("SHA-256 differs from the index; run `distgan index` again if the shard changed")
