"""A source of images in an idx file, the format of MNIST: big-endian magic and sizes, then uint8 pixels.

Format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits". The magic number is two zero bytes,
the element type (8 for uint8) and the number of dimensions: 3 for images (count, rows, columns), 1 for labels.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from distgan.data.packing.sources.source import MAX_PIXELS, Pixels, Source, pixel_source
from distgan.errors import UserError
from distgan.files import explained, is_disk_error, reason

_UNSIGNED_BYTE = 0x08
_MAX_BYTES = 1 << 36
_BLOCK = 1 << 20
_FIX = "name an images file such as train-images-idx3-ubyte or train-images-idx3-ubyte.gz"


def open_idx(path: Path) -> Source[Pixels]:
    """Open the images of an idx file, gzipped or not, with the labels of the labels file beside it, if any.

    Raises:
        UserError: a file is damaged or has the wrong format; the message names it.
    """
    images = _read_array(path, dimensions=3)
    if 0 in images.shape:
        raise UserError(f"{path}: found no images ({' x '.join(map(str, images.shape))}); {_FIX}")
    if images.shape[1] * images.shape[2] > MAX_PIXELS:
        raise UserError(
            f"{path}: images too large: found {images.shape[1]} x {images.shape[2]}, expected at most "
            f"{MAX_PIXELS} pixels"
        )
    names = [f"{path.name}[{number}]" for number in range(len(images))]
    labels_path = _labels_beside(path)
    if labels_path is None:
        note = f"found no labels file ({_labels_name(path.name)}) beside {path.name}: the images have no labels"
        return pixel_source(names, images, notes=(note,))
    labels = _read_array(labels_path, dimensions=1)
    if len(labels) != len(images):
        raise UserError(
            f"{labels_path}: wrong number of labels: found {len(labels)}, expected {len(images)}, the number of images "
            f"in {path.name}; use matching files"
        )
    return pixel_source(names, images, labels.astype(np.int64))


def is_idx(head: bytes) -> bool:
    """Return True if a file that begins with these bytes may be an idx file, gzipped or not."""
    return head[:2] in (b"\x1f\x8b", b"\0\0")


def _labels_name(name: str) -> str:
    return name.replace("images", "labels").replace("idx3", "idx1")


def _labels_beside(path: Path) -> Path | None:
    name = _labels_name(path.name)
    if name == path.name:
        return None
    other = name.removesuffix(".gz") if name.endswith(".gz") else name + ".gz"
    return next((path.with_name(n) for n in (name, other) if path.with_name(n).is_file()), None)


def _read_array(path: Path, dimensions: int) -> Pixels:
    """Return the file's array, memory-mapped. A gzipped file is first unpacked into an unnamed temporary file."""
    try:
        with open(path, "rb") as plain:
            if plain.read(2) != b"\x1f\x8b":
                plain.seek(0)
                return _map_array(plain, path, dimensions)
            plain.seek(0)
            with gzip.GzipFile(fileobj=plain) as packed, _temporary_file(path) as unpacked:
                _unpack(packed, unpacked, path, dimensions)
                return _map_array(unpacked, path, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot read the file: {reason}; download it again") from None


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield an unnamed file in the folder for temporary files. Raises UserError naming that folder if this fails."""
    folder = os.environ.get("TMPDIR", "/tmp")
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        if not is_disk_error(error) and not isinstance(
            error, FileNotFoundError
        ):  # FileNotFoundError: no folder is usable
            raise
        why = reason(explained(error, folder))
        raise UserError(
            f"{path}: cannot unpack into {folder}: {why}; set TMPDIR to another folder, or unpack the file yourself"
        ) from None


def _unpack(packed: gzip.GzipFile, unpacked: IO[bytes], path: Path, dimensions: int) -> None:
    shape, header = _read_header(packed, path, dimensions)
    unpacked.write(header)
    remaining = math.prod(shape) + 1  # reading one extra byte detects excess data
    while remaining > 0 and (block := packed.read(min(_BLOCK, remaining))):
        unpacked.write(block)
        remaining -= len(block)
    unpacked.flush()
    unpacked.seek(0)


def _map_array(file: IO[bytes], path: Path, dimensions: int) -> Pixels:
    shape, header = _read_header(file, path, dimensions)
    expected, found = math.prod(shape), os.fstat(file.fileno()).st_size - len(header)
    if found != expected:
        kind = "truncated" if found < expected else "longer than its header says"
        raise UserError(
            f"{path}: {kind}: found {'at least ' if found > expected else ''}{found} bytes, expected {expected} for "
            f"{' x '.join(map(str, shape))} uint8; download it again"
        )
    if expected == 0:
        return np.zeros(shape, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r", len(header), shape))


def _read_header(file: IO[bytes] | gzip.GzipFile, path: Path, dimensions: int) -> tuple[tuple[int, ...], bytes]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE:
        raise UserError(f"{path}: not an idx file of uint8: its first bytes are {magic.hex(' ') or 'missing'}; {_FIX}")
    if magic[3] != dimensions:
        hint = " (a labels file)" if magic[3] == 1 else ""
        raise UserError(f"{path}: wrong idx file: found {magic[3]} dimensions{hint}, expected {dimensions}; {_FIX}")
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise UserError(f"{path}: the file is truncated inside its header; download it again")
    shape = struct.unpack(f">{dimensions}I", sizes)
    if math.prod(shape) > _MAX_BYTES:
        raise UserError(
            f"{path}: array too large: found {math.prod(shape)} bytes in its header, expected at most {_MAX_BYTES}"
        )
    return shape, magic + sizes
