"""A source of images in a zip archive, read by offset without unpacking it.

The standard library reads the central directory once. Members are then read with `pread` at their offset, so that no
worker process needs to parse the directory of a million members again.
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distgan.data.packing.sources.source import (
    DATASET_JSON,
    MAX_BYTES,
    MAX_JSON_BYTES,
    InvalidSampleError,
    Source,
    assign_labels,
    check_any,
    describe_ignored,
    is_hidden,
    is_image,
)
from distgan.errors import UserError, printable

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field


class ZipMember(NamedTuple):
    """Location and size of one file in an archive, from its central directory."""

    offset: int
    compressed_size: int
    size: int
    method: int
    checksum: int


class ZipReader:
    """Read members of one archive. Raises InvalidSampleError if size or checksum differ from the directory."""

    def __init__(self, path: str, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - kept open for the life of the reader

    def __reduce__(self) -> tuple[type[ZipReader], tuple[str, int]]:
        return ZipReader, (self.path, self.max_bytes)

    def __call__(self, member: ZipMember) -> bytes:
        if max(member.size, member.compressed_size) > self.max_bytes:
            raise InvalidSampleError(
                f"file too large: found {max(member.size, member.compressed_size)} bytes, expected at most "
                f"{self.max_bytes} bytes"
            )
        header = self._read(member.offset, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise InvalidSampleError(f"the archive is damaged: found no file header at byte {member.offset}")
        data = self._read(member.offset + len(header) + name_length + extra_length, member.compressed_size)
        if member.method == zipfile.ZIP_DEFLATED:
            data = _inflate(data, member.size)
        elif member.method != zipfile.ZIP_STORED:
            raise InvalidSampleError(
                f"unsupported compression: found method {member.method}, expected stored (0) or deflated (8)"
            )
        if len(data) != member.size or zlib.crc32(data) != member.checksum:
            raise InvalidSampleError("the archive is damaged: size or checksum differs from its directory")
        return data

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except (OSError, OverflowError) as error:
            raise InvalidSampleError(f"cannot read the archive: {error}") from None
        if len(data) != size:
            raise InvalidSampleError("the archive is damaged: it ends inside this file")
        return data


def open_zip(path: Path, *, labeled: bool = True) -> Source[ZipMember]:
    """Open the images in an archive, labeled as in a folder. A single top folder that holds all files is skipped.

    Without `labeled`, the folders have no meaning, and images may be in any of them.

    Raises:
        UserError: the archive is damaged, unsafe or wrongly labeled; the message names it and the member.
    """
    infos = [info for info in _directory(path) if not info.filename.endswith("/")]
    _check_overlap(infos, path)
    members: dict[str, ZipMember] = {}
    for info in infos:
        name = _checked_name(info, path)
        if is_hidden(name) or stat.S_ISLNK(info.external_attr >> 16):
            continue
        if name in members:
            raise UserError(f"{path}: found {printable(name)} twice, expected unique names; create the archive again")
        members[name] = ZipMember(info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
    top = _common_folder([name for name in members if is_image(name) or name.rpartition("/")[2] == DATASET_JSON])
    members = {name.removeprefix(top): member for name, member in members.items()}
    names = sorted(name for name in members if is_image(name))
    reader = ZipReader(str(path))
    dataset_json = members.pop(DATASET_JSON, None)
    notes = describe_ignored(name for name in members if not is_image(name))
    if not labeled:
        check_any(names, str(path), notes)
        return Source(names, [members[name] for name in names], reader, notes=notes)
    labels, class_names = assign_labels(names, _dataset_json(path, dataset_json), str(path), notes)
    return Source(names, [members[name] for name in names], reader, labels, class_names, notes)


def _directory(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # What zipfile raises for damaged archives, and for kinds of archives that it does not read.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: not a readable zip archive: {reason}; download or create it again") from None


def _checked_name(info: zipfile.ZipInfo, path: Path) -> str:
    name = info.filename.replace("\\", "/")
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        raise UserError(
            f"{path}: the name {printable(name)} points outside the archive; create it again with relative names"
        )
    if info.flag_bits & 1:
        raise UserError(f"{path}: {printable(name)} is encrypted; unpack the archive and pack the folder")
    return name


def _check_overlap(infos: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """Raise UserError if members share bytes: a small archive could then hold terabytes (Fifield, WOOT 2019)."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    for info, following in itertools.pairwise(ordered):
        if info.header_offset + _LOCAL_HEADER.size + info.compress_size > following.header_offset:
            name = printable(following.filename)
            raise UserError(f"{path}: {name} overlaps another member, as in a zip bomb; create the archive again")


def _common_folder(names: Sequence[str]) -> str:
    """Return `folder/` if all names lie below one top folder, else an empty string."""
    tops = {name.partition("/")[0] + "/" if "/" in name else "" for name in names}
    return tops.pop() if len(tops) == 1 else ""


def _inflate(data: bytes, size: int) -> bytes:
    try:
        # Inflating one extra byte detects excess data without inflating a zip bomb.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error:
        raise InvalidSampleError("the archive is damaged: cannot decompress this file") from None


def _dataset_json(path: Path, member: ZipMember | None) -> bytes | None:
    if member is None:
        return None
    try:
        return ZipReader(str(path), MAX_JSON_BYTES)(member)
    except InvalidSampleError as error:
        raise UserError(f"{path}/{DATASET_JSON}: {error}") from None
