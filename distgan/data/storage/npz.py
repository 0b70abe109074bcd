"""Arrays in NumPy's .npz archives: bounded, without pickles, and memory-mapped where the archive allows it."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.errors import UserError, printable

_LOCAL_HEADER = 30
"""Bytes of a zip member's own header before its name."""


class Layout(NamedTuple):
    """Type and place of an array in a member of an archive."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Any
    """`C` or `F`."""
    start: int
    """Offset of the first number in the member's content, in bytes."""

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_npz(path: Path) -> bool:
    """Return True if a file is named as an .npz archive."""
    return path.suffix.lower() == ".npz"


def array_names(path: Path) -> list[str]:
    """Return the names of the arrays in an archive. Raises UserError if it is none."""
    with _archive(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_array(path: Path, name: str, max_bytes: int) -> NDArray[Any]:
    """Read an array of at most `max_bytes` bytes. Its checksum is verified.

    Raises UserError if the archive or the array is missing, damaged or too large, or holds objects, which are pickles.
    """
    with _archive(path) as archive, archive.open(f"{name}.npy") as member:
        layout = _layout(member, path, name)
        if layout.size > max_bytes:
            raise UserError(f"{path}: {name} is too large: found {layout.size:,} bytes, expected at most {max_bytes:,}")
        data = member.read(layout.size + 1)
        if len(data) != layout.size:
            raise UserError(f"{path}: {name} differs in size from its header; download the file again")
        return np.frombuffer(data, layout.dtype).reshape(layout.shape, order=layout.order)


def map_array(path: Path, name: str) -> NDArray[Any]:
    """Memory-map an array that is stored without compression, as `numpy.savez` writes it.

    Raises UserError as `read_array` does, and if it is compressed.
    """
    with _archive(path) as archive, archive.open(f"{name}.npy") as member:
        layout, info = _layout(member, path, name), archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path}: {name} is compressed; write the file again with numpy.savez")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
    start = info.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    if info.file_size != layout.start + layout.size or start + info.file_size > path.stat().st_size:
        raise UserError(f"{path}: {name} differs in size from its header; download the file again")
    if not layout.size:
        return np.zeros(layout.shape, layout.dtype)
    mapped = np.memmap(path, layout.dtype, "r", start + layout.start, layout.shape, layout.order)
    return np.asarray(mapped)


def checksum(path: Path, name: str) -> int:
    """Return the CRC-32 of an array, as its archive says it. Raises UserError if the array is missing."""
    with _archive(path) as archive:
        return archive.getinfo(f"{name}.npy").CRC


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except KeyError as error:
        with zipfile.ZipFile(path) as archive:
            found = ", ".join(printable(name.removesuffix(".npy"))[:40] for name in archive.namelist()[:8])
        wanted = str(error.args[0]).partition("'")[2].partition(".npy")[0]
        raise UserError(f"{path}: found no array {wanted}, but {found or 'nothing'}") from None
    except Exception as error:  # zipfile and NumPy's parser of Python literals raise many exceptions
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a readable .npz archive: {why}; download it again") from None


def _layout(member: IO[bytes], path: Path, name: str) -> Layout:
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(member)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are pickles; save it as an array of numbers")
    return Layout(dtype, shape, "F" if fortran else "C", member.tell())
