"""Read the headers of a tar without its contents: ustar, GNU long names and PAX extended headers.

Layout (POSIX.1-2017, pax "ustar Interchange Format"): 512-byte header blocks, each followed by the member's data
padded to 512 bytes; a block of zeros ends the archive. The last header block of a member stands directly before its
data, so `offset - 512` is always that header. Concatenated tars have end marks between them.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from distgan.data.storage import filesystem, locations
from distgan.errors import UserError

BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20
_SMALL_WINDOW, _LARGE_WINDOW = 4 << 10, 1 << 20
_WORTH_READING_OVER = 64 << 10
_ZEROS_AT_ONCE, _MAX_ZEROS = 16 << 10, 64 << 20
"""Zeros are read in pieces large enough for the padding that most programs write after the end mark."""
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAMES = {b"L": b"path", b"K": b"linkpath"}
_REFUSED = {b"S": "is sparse", b"M": "continues from another volume"}
_WITHOUT_SAMPLE = (b"D", b"V")
"""GNU tar's folder listing and volume name."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x04\x22\x4d\x18": "unlz4",
}

PassedOver = Callable[[str, bytes], None]
"""Callback for a member that cannot be a sample: receives its sort and its name."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int
    """Byte offset of its data in the tar; for a hard link, of the data of the file that it names."""
    size: int
    """Bytes of data."""
    crc: int
    """CRC-32 of the header block before the data."""
    start: int
    """Byte offset of its first header block."""
    end: int
    """Byte offset after its last block."""


class Source(Protocol):
    """A file that `walk` reads: a `WindowReader`, or a part of a tar in memory."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...


class Digest(Protocol):
    """The part of hashlib's interface that is used here."""

    def update(self, data: bytes, /) -> None: ...


class WindowReader:
    """Read small pieces at increasing offsets of a local or remote file with few requests and little traffic.

    Between large members, fetch only a few kB around each header. Over small members, read windows of up to 1 MiB,
    because these bytes cost less than more round trips.
    """

    def __init__(self, url: str) -> None:
        self._descriptor, self._remote = -1, None
        if locations.is_remote(url):
            self._remote = filesystem.RemoteFile(url)
            self.size = self._remote.size
        else:
            self._descriptor = os.open(url, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO would block
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
        """Return up to `length` bytes at `offset`, fewer at the end of the file. Raises OSError."""
        end = self._start + len(self._data)
        if offset < self._start or offset + length > end:
            near = self._start <= offset < end + _WORTH_READING_OVER
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


def ignore(what: str, name: bytes) -> None:
    """Ignore skipped members."""


def walk(reader: Source, shard: str, digest: Digest, passed: PassedOver = ignore) -> Iterator[Member]:
    """Yield the regular files of a tar in order, and feed every header byte to `digest`.

    A hard link to an earlier file of the tar yields a member with the same data. `passed` receives symbolic links,
    devices and all other hard links; no link is followed on disk. Reading continues after an end mark, because tars
    may be concatenated.

    Raises:
        UserError: the file is not a tar, is compressed, truncated or damaged, or names a path outside itself. The
            message names `shard` and the member or byte.
        OSError: a read failed.
    """
    start, offset, ended, name = 0, 0, False, b""
    override: dict[bytes, bytes] = {}
    files: dict[bytes, Member] = {}
    while True:
        header = reader.read(offset, BLOCK)
        if header.count(0) == len(header) and (len(header) == BLOCK or ended):
            if not header:
                return
            start = offset = _skip_zeros(reader, offset, shard)
            ended = True
            continue
        if len(header) < BLOCK and not ended:
            after = f"after {_show(name)}" if name else "before its first member"
            raise _not_a_tar(header, shard) or UserError(
                f"{shard}: truncated tar: it ends {after} without the end mark; copy or write it again"
            )
        _check_header(header, offset, ended, shard, name)
        ended = False
        digest.update(header)
        kind, size, data = header[156:157], _number(header[124:136], shard), offset + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            payload = _extended(reader, data, size, shard)
            digest.update(payload)
            if kind in _LONG_NAMES:
                override[_LONG_NAMES[kind]] = payload.rstrip(b"\0")
            elif kind == b"x":
                override.update(_pax_records(payload, shard))
        else:
            name = override.get(b"path", _header_name(header))
            if kind in _REGULAR:
                size = _pax_size(override, size, shard, name)
                if data + size > reader.size:
                    raise UserError(
                        f"{shard}: truncated tar: member {_show(name)} ends at byte {data + size:,}, but the file "
                        f"ends at byte {reader.size:,}; copy or write it again"
                    )
                if kind != b"0" and name.endswith(b"/"):  # pre-POSIX tars mark a folder this way
                    size = 0
                else:
                    _check_member(name, override, shard)
                    end = min(data + -(-size // BLOCK) * BLOCK, reader.size)
                    member = files[_target(name)] = Member(name, data, size, zlib.crc32(header), start, end)
                    yield member
            elif kind == b"1":
                size = 0
                _check_member(name, override, shard)
                linked = files.get(_target(override.get(b"linkpath", header[157:257].partition(b"\0")[0])))
                if linked is None:
                    passed("hard links without an earlier target in the tar", name)
                else:
                    member = files[_target(name)] = linked._replace(name=name, start=start, end=data)
                    yield member
            elif kind in _REFUSED:
                raise UserError(
                    f"{shard}: member {_show(name)} {_REFUSED[kind]}, expected a regular file; write the tar again"
                )
            elif kind in b"23456":
                size = 0
                if kind != b"5":
                    passed("symbolic links" if kind == b"2" else "devices and pipes", name)
            elif kind not in _WITHOUT_SAMPLE:
                passed(f"members of type {kind!r}", name)
            override = {}
        offset = data + -(-size // BLOCK) * BLOCK
        if not override:
            start = offset


def _skip_zeros(reader: Source, offset: int, shard: str) -> int:
    """Return the offset of the next block that is not all zeros, or the end of the file."""
    start = offset
    while offset < reader.size:
        chunk = reader.read(offset, _ZEROS_AT_ONCE)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        offset += zeros if zeros == len(chunk) else zeros // BLOCK * BLOCK
        if zeros < len(chunk):
            break
        if offset - start > _MAX_ZEROS:
            raise UserError(
                f"{shard}: damaged tar: found only zeros from byte {start:,} to {offset:,}; copy or write it again"
            )
    return offset


def _check_header(header: bytes, offset: int, ended: bool, shard: str, last: bytes) -> None:
    try:
        stored = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        stored = -1
    if len(header) == BLOCK and stored == sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return
    if not offset:
        raise _not_a_tar(header, shard) or UserError(
            f"{shard}: not a tar: found no tar header in its first {BLOCK} bytes; name a tar"
        )
    if ended:
        raise UserError(
            f"{shard}: damaged tar: found other data after its end mark, from byte {offset:,}; "
            "truncate the file there, or write it again"
        )
    raise UserError(
        f"{shard}: damaged tar: found no valid header at byte {offset:,}, after {_show(last)}; copy or write it again"
    )


def _not_a_tar(start: bytes, shard: str) -> UserError | None:
    """Return the error for a file whose first bytes identify another format, or None."""
    if start.startswith(_LFS_POINTER):
        return UserError(f"{shard}: found a Git LFS pointer, expected a tar; run `git lfs pull` in its repository")
    if start.startswith(b"PK\x03\x04"):
        return UserError(
            f"{shard}: found a zip, expected a tar; run `distgan pack ZIP DEST` to make shards of its images"
        )
    if start.startswith(_IMAGES) or (start.startswith(b"RIFF") and start[8:12] == b"WEBP"):
        return UserError(f"{shard}: found an image, expected a tar; run `distgan pack FOLDER DEST` on its folder")
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            return UserError(
                f"{shard}: found a compressed file, expected an uncompressed tar; decompress it with {program} "
                "(images are already compressed)"
            )
    return None


def _number(field: bytes, shard: str) -> int:
    """Parse a size: octal digits, or GNU's base-256 with the top bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"{shard}: damaged tar: found {field!r}, expected a size; copy or write it again")
    return value


def _header_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extended(reader: Source, data: int, size: int, shard: str) -> bytes:
    if size > _MAX_EXTENDED_HEADER:
        raise UserError(
            f"{shard}: extended header too large: found {size:,} bytes, expected at most {_MAX_EXTENDED_HEADER:,}; "
            "write the tar again"
        )
    payload = reader.read(data, size)
    if len(payload) < size:
        raise UserError(f"{shard}: truncated tar: the file ends inside an extended header; copy or write it again")
    return payload


def _pax_records(payload: bytes, shard: str) -> dict[bytes, bytes]:
    """Parse records `LENGTH KEY=VALUE\\n`; LENGTH is the decimal byte count of the whole record."""
    records = {}
    start, end = 0, len(payload.rstrip(b"\0"))
    while start < end:
        space = payload.find(b" ", start, start + 9)
        length = payload[start:space] if space >= 0 else payload[start : start + 9]
        if not length.isdigit() or not len(length) + 2 < int(length) <= end - start:
            raise UserError(
                f"{shard}: damaged tar: a PAX header has a record of invalid length {length!r}; copy or write it again"
            )
        key, _, value = payload[space + 1 : start + int(length) - 1].partition(b"=")
        records[key] = value
        start += int(length)
    return records


def _pax_size(override: dict[bytes, bytes], size: int, shard: str, name: bytes) -> int:
    if b"size" not in override:
        return size
    text = override[b"size"]
    if not text.isdigit() or len(text) > 20:
        raise UserError(
            f"{shard}: damaged tar: member {_show(name)} has the invalid PAX size {text[:20]!r}; copy or write it again"
        )
    return int(text)


def _target(name: bytes) -> bytes:
    """Return a member's name in the form used to resolve links: `./a` becomes `a`."""
    return name.removeprefix(b"./")


def _check_member(name: bytes, override: dict[bytes, bytes], shard: str) -> None:
    if name.startswith(b"/") or b".." in name.split(b"/"):
        raise UserError(f"{shard}: member {_show(name)} has a path outside the tar; write the tar with relative paths")
    if b"\n" in name or b"\0" in name:
        raise UserError(
            f"{shard}: member {_show(name)} has a line break or NUL in its name; rename it and write the tar again"
        )
    if any(key.startswith(b"GNU.sparse") for key in override):
        raise UserError(f"{shard}: member {_show(name)} is sparse, expected a regular file; write the tar again")


def _show(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace")[:200])
