"""Remote shards in a node-local folder of bounded size, shared by all processes of the node.

A shard's file is named by a hash of its whole URL and of what the index knows about it, so that two shards of one
name, or two versions of one shard, never meet. Files appear whole, by a rename. All coordination is by `flock`,
which the kernel undoes when a process dies:

- `KEY.claim` is locked by the process that downloads KEY; the others wait for it;
- `lock` is held briefly while a download gets its final name, and while room is made: finished shards go, least
  recently used first, as do the remains of downloads whose process died. A `KEY-SIZE.part` counts with its full size
  from the moment it exists.

A reader that has a shard open keeps it readable when it is evicted, and fetches it again the next time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from distgan.config import DataConfig, cache_folder
from distgan.data.index.table import Shard
from distgan.data.storage import filesystem
from distgan.files import DiskError, disk_errors

_POLL_SECONDS = 0.02
_WAIT_SECONDS = 300.0


class ShardCache:
    """The cache as one process sees it; safe to use from several threads and processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    @classmethod
    def of(cls, config: DataConfig) -> ShardCache:
        """The cache that a run's config names. Raises UserError if its folder cannot be used."""
        folder = cache_folder(config.cache_dir) / "shards"
        filesystem.open_cache(folder)
        return cls(folder, int(config.cache_gigabytes * 1e9))

    def open(self, shard: Shard) -> int:
        """A read-only descriptor of the whole shard, downloaded first if need be; the caller closes it.

        Raises OSError when the shard cannot be had, is not of the size (and hash) its index says, or finds no room.
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
                raise OSError(errno.ETIMEDOUT, f"another process still downloads it after {_WAIT_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)

    def touch(self, shards: Iterable[Shard]) -> None:
        """Note that these will be needed soon, so that others are evicted first."""
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
            with contextlib.suppress(OSError):  # a disk that turned read-only can still be read
                os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None

    def _download(self, path: Path, shard: Shard) -> int | None:
        """None when another process has it in hand."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with filesystem.locked(path.with_suffix(".claim")) as claimed:
                return self._download_claimed(path, shard) if claimed and not path.exists() else None

    def _download_claimed(self, path: Path, shard: Shard) -> int:
        part = path.with_name(f"{path.stem}-{shard.size}.part")
        try:
            with disk_errors(self._folder):
                self._reserve(part, shard)
                filesystem.download(shard.url, str(part), shard.size)
                _check(part, shard)
                descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                os.fsync(descriptor)
                # Who makes room lists the folder, and could miss a file that changes its name meanwhile.
                with filesystem.locked(self._folder / "lock", wait=True):
                    os.rename(part, path)
                return descriptor
        finally:
            with contextlib.suppress(OSError):
                part.unlink()

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Create the empty part once its full size fits under the bound, evicting what was used longest ago."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            with filesystem.locked(self._folder / "lock", wait=True):
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
                    with filesystem.locked(self._folder / f"{key}.claim") as abandoned:
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
        raise OSError(f"{size:,} bytes came, its index says {shard.size:,}; run `distgan index` again if it changed")
    if shard.sha256 is not None:
        with part.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise OSError("its SHA-256 is not the one in its index; run `distgan index` again if it changed")
