"""Walking the headers of a tar without reading its contents: ustar, GNU long names and PAX extended headers.

Layout (POSIX.1-2017, pax "ustar Interchange Format"): 512-byte header blocks, each followed by the member's data
padded to 512 bytes; a block of zeros ends the archive. The last header block of a member stands directly before its
data, so `offset - 512` is always that header.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from distgan.data import locations, storage
from distgan.errors import UserError

BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20
_SMALL_WINDOW, _LARGE_WINDOW = 4 << 10, 1 << 20
_WORTH_READING_OVER = 64 << 10
_REGULAR = (b"0", b"\0", b"7")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int
    """Byte offset of its data in the tar."""
    size: int
    """Bytes of data."""
    crc: int
    """CRC-32 of the header block before the data."""


class Digest(Protocol):
    """What hashlib's objects offer."""

    def update(self, data: bytes, /) -> None: ...


class WindowReader:
    """Reads small pieces at rising offsets of a local or remote file in few requests and little traffic.

    Between large members only a few kB around each header are fetched; over small members it reads on in windows of
    up to 1 MiB, since the bytes cost less than the round trips.
    """

    def __init__(self, url: str) -> None:
        self._descriptor, self._remote = -1, None
        if locations.is_remote(url):
            self._remote = storage.RemoteFile(url)
            self.size = self._remote.size
        else:
            self._descriptor = os.open(url, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would be waited for
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(self._descriptor)
                raise OSError("not a regular file")
            self.size = status.st_size
        self._window, self._start, self._data = _SMALL_WINDOW, 0, b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._remote is not None:
            self._remote.close()
        else:
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer at the end of the file. Raises OSError."""
        end = self._start + len(self._data)
        if offset < self._start or offset + length > end:
            near = 0 <= offset - end < _WORTH_READING_OVER
            self._window = min(4 * self._window, _LARGE_WINDOW) if near else _SMALL_WINDOW
            self._start = offset
            self._data = self._fetch(offset, min(offset + max(length, self._window), self.size))
        return self._data[offset - self._start : offset - self._start + length]

    def _fetch(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        if self._remote is not None:
            return self._remote.read(start, stop)
        return os.pread(self._descriptor, stop - start, start)


def walk(reader: WindowReader, shard: str, digest: Digest) -> Iterator[Member]:
    """The regular files of a tar in order; every header byte is fed to `digest`.

    Links, folders and devices are passed over: nothing is ever followed. Raises UserError, naming `shard` and the
    member, for a file that is no tar, is compressed, is cut short, or names a path outside itself; OSError as the
    reader does.
    """
    offset = 0
    name = b""
    override: dict[bytes, bytes] = {}
    while True:
        header = reader.read(offset, BLOCK)
        if len(header) < BLOCK:
            after = f"after {_show(name)}" if name else "before its first member"
            raise UserError(f"{shard}: truncated tar: it ends {after} without the end mark; copy or write it again")
        if header.count(0) == BLOCK:
            return
        _check_checksum(header, offset, shard, name)
        digest.update(header)
        kind, size, data = header[156:157], _number(header[124:136], shard), offset + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            payload = _extended(reader, data, size, shard)
            digest.update(payload)
            if kind == b"L":
                override[b"path"] = payload.rstrip(b"\0")
            elif kind == b"x":
                override.update(_pax_records(payload, shard))
        else:
            name = override.get(b"path", _header_name(header))
            if kind in _REGULAR:
                size = _pax_size(override, size, shard, name)
                if data + size > reader.size:
                    raise UserError(
                        f"{shard}: truncated tar: member {_show(name)} ends at byte {data + size:,}, the file at "
                        f"{reader.size:,}; copy or write it again"
                    )
                if kind != b"0" and name.endswith(b"/"):  # how tars older than POSIX mark a folder
                    size = 0
                else:
                    _check_member(name, kind, override, shard)
                    yield Member(name, data, size, zlib.crc32(header))
            elif kind == b"S":
                raise UserError(f"{shard}: member {_show(name)} is sparse, which is not read; write the tar again")
            elif kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                size = 0
            override = {}
        offset = data + -(-size // BLOCK) * BLOCK


def _check_checksum(header: bytes, offset: int, shard: str, last: bytes) -> None:
    try:
        stored = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        stored = -1
    if stored == sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return
    if offset:
        raise UserError(f"{shard}: damaged tar: no valid header at byte {offset:,}, after {_show(last)}")
    if header[:2] == b"\x1f\x8b" or header[:4] == b"\x28\xb5\x2f\xfd" or header[:3] == b"BZh":
        raise UserError(
            f"{shard}: a compressed tar cannot be read by offset; decompress it (images are compressed anyway)"
        )
    raise UserError(f"{shard}: not a tar (its first block is no tar header)")


def _number(field: bytes, shard: str) -> int:
    """Octal digits, or GNU's base-256 with the top bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"{shard}: damaged tar: {field!r} is not a size")
    return value


def _header_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extended(reader: WindowReader, data: int, size: int, shard: str) -> bytes:
    if size > _MAX_EXTENDED_HEADER:
        raise UserError(f"{shard}: an extended header of {size:,} bytes is refused; at most {_MAX_EXTENDED_HEADER:,}")
    payload = reader.read(data, size)
    if len(payload) < size:
        raise UserError(f"{shard}: truncated tar: it ends inside an extended header; copy or write it again")
    return payload


def _pax_records(payload: bytes, shard: str) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record in decimal."""
    records = {}
    start, end = 0, len(payload.rstrip(b"\0"))
    while start < end:
        space = payload.find(b" ", start, start + 9)
        length = payload[start:space] if space >= 0 else payload[start : start + 9]
        if not length.isdigit() or not len(length) + 2 < int(length) <= end - start:
            raise UserError(f"{shard}: damaged tar: a PAX header has a record of length {length!r}")
        key, _, value = payload[space + 1 : start + int(length) - 1].partition(b"=")
        records[key] = value
        start += int(length)
    return records


def _pax_size(override: dict[bytes, bytes], size: int, shard: str, name: bytes) -> int:
    if b"size" not in override:
        return size
    text = override[b"size"]
    if not text.isdigit() or len(text) > 20:
        raise UserError(f"{shard}: damaged tar: member {_show(name)} has the PAX size {text[:20]!r}")
    return int(text)


def _check_member(name: bytes, kind: bytes, override: dict[bytes, bytes], shard: str) -> None:
    if name.startswith(b"/") or b".." in name.split(b"/"):
        raise UserError(f"{shard}: member {_show(name)} is a path outside the tar, which is refused; write it again")
    if b"\n" in name or b"\0" in name:
        raise UserError(f"{shard}: member {_show(name)} has a line break or NUL in its name, which is refused")
    if any(key.startswith(b"GNU.sparse") for key in override):
        raise UserError(f"{shard}: member {_show(name)} is sparse, which is not read; write the tar again")


def _show(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace")[:200])
