"""Write WebDataset shards: ustar files whose bytes depend only on their members.

They are the bytes of ``webdataset.TarWriter(path, user="", group="", mode=0o644, mtime=0, encoder=False)``: the members
of a sample sorted by extension, empty device fields, and zeros at the end up to a multiple of 10,240 bytes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from distgan.errors import UserError

_BLOCK = 512
_RECORD = 20 * _BLOCK
"""The size of a shard is a multiple of this, as GNU tar and Python's tarfile write tars."""
_END = bytes(2 * _BLOCK)
_MODE_AND_OWNER = b"0000644\0" + b"0000000\0" * 2
_MODIFIED = b"00000000000\0"
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_SUM_OF_REST = sum(_REST)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ShardSize:
    """Limit of a shard: a number of samples, or a size in bytes that its file must not exceed."""

    samples: int | None = None
    size: int | None = None

    @classmethod
    def parse(cls, text: int | str) -> Self:
        """Parse samples (``500``) or bytes (``64MB``; KB, MB and GB are powers of 1000). Raises UserError."""
        match = re.fullmatch(r"([1-9][0-9]{0,14})\s*([KMG]B)?", str(text).strip(), re.IGNORECASE)
        if match is None:
            raise UserError(f"shard size {str(text)!r}: expected samples such as 1000, or bytes such as 256MB or 1GB")
        number, unit = int(match[1]), match[2]
        return cls(size=number * _UNITS[unit.upper()]) if unit else cls(samples=number)


class ShardWriter:
    """Write samples into ``shard-000000.tar``, ``shard-000001.tar``, ... of a folder; use as a context manager.

    Each shard is flushed to disk before the next one begins. A sample that is larger than the limit gets a shard of its
    own.
    """

    def __init__(self, folder: Path, limit: ShardSize) -> None:
        self.folder = folder
        self.limit = limit
        self.paths: list[Path] = []
        self.size = 0
        """Total bytes of all shards so far."""
        self._file: BinaryIO | None = None
        self._samples = 0
        self._shard_size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample: one member ``KEY.EXTENSION`` per extension, sorted by extension."""
        parts = []
        for extension, data in sorted(members.items()):
            parts += [ustar_header(f"{key}.{extension}", len(data)), data, bytes(-len(data) % _BLOCK)]
        size = sum(map(len, parts))
        if self._file is None or self._is_full(size):
            self._start_next()
        assert self._file is not None
        self._file.writelines(parts)
        self._samples += 1
        self._shard_size += size
        self.size += size

    def close(self) -> None:
        """Finish the open shard and flush it to disk."""
        if self._file is None:
            return
        end = _END + bytes(-(self._shard_size + len(_END)) % _RECORD)
        with self._file as file:
            self._file = None
            file.write(end)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(end)

    def _is_full(self, size: int) -> bool:
        if self.limit.samples is not None and self._samples >= self.limit.samples:
            return True
        if self.limit.size is None:
            return False
        return self._shard_size + size + len(_END) > self.limit.size // _RECORD * _RECORD

    def _start_next(self) -> None:
        self.close()
        path = self.folder / f"shard-{len(self.paths):06d}.tar"
        self._file = path.open("xb", buffering=1 << 20)
        self.paths.append(path)
        self._samples = self._shard_size = 0


def ustar_header(name: str, size: int) -> bytes:
    """Return the 512-byte ustar header (POSIX.1-1988) of a regular file: mode 644, owner 0, modification time 0.

    Args:
        name: 1 to 100 ASCII characters.
        size: bytes, below 8 GiB.
    """
    encoded = name.encode("ascii")
    assert 0 < len(encoded) <= 100, name
    assert 0 <= size < 8**11, size
    before = encoded.ljust(100, b"\0") + _MODE_AND_OWNER + b"%011o\0" % size + _MODIFIED
    # The checksum is the sum of all bytes, with its own field read as eight spaces.
    return before + b"%06o\0 " % (sum(before) + 8 * ord(" ") + _SUM_OF_REST) + _REST
