"""Points, each a file in NumPy's format: one vector of little-endian float32 or float64."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from distgan.errors import UnreadableSampleError

_HEADER_BYTES = 128
"""Where NumPy lets the data of a vector begin."""
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_DTYPES = ("<f4", "<f8")


def decode_into(out: NDArray[np.float32], data: bytes | memoryview, extension: str = "npy") -> None:
    """Decode a vector in NumPy's format into `out`, float32 (dimensions,).

    Raises:
        UnreadableSampleError: of another type or size, damaged, or not finite in float32.
    """
    try:
        dtype, shape, start = _read_header(bytes(data[:_HEADER_BYTES]))
    except Exception as error:  # NumPy parses a Python literal, which fails in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableSampleError(f"is not in NumPy's format: {reason[:200]}") from None
    if dtype.str not in _DTYPES or shape != out.shape:
        raise UnreadableSampleError(
            f"an array of {dtype.str} and shape {shape}; a point is {len(out)} numbers (data.dimensions), <f4 or <f8"
        )
    if len(data) != start + dtype.itemsize * len(out):
        raise UnreadableSampleError("is not as long as its header says")
    with np.errstate(over="ignore"):
        out[...] = np.frombuffer(data, dtype, len(out), start)
    if not np.isfinite(out).all():
        raise UnreadableSampleError("holds numbers that are not finite in float32")


def encode(point: NDArray[np.float32]) -> bytes:
    """A vector in NumPy's format."""
    file = io.BytesIO()
    npy.write_array(file, point.astype("<f4"), version=(1, 0), allow_pickle=False)
    return file.getvalue()


@lru_cache(maxsize=64)  # parsing takes longer than all the rest, and a set's headers are all the same
def _read_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Type and shape of an array, and where its data begin."""
    file = io.BytesIO(head)
    version = npy.read_magic(file)
    if version not in _READ_HEADER:
        raise ValueError(f"version {version} is not one of {', '.join(map(str, _READ_HEADER))}")
    shape, _, dtype = _READ_HEADER[version](file, max_header_size=_HEADER_BYTES)
    return dtype, shape, file.tell()
