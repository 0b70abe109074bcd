"""Decode and encode points. Each point is an .npy file of one little-endian float32 or float64 vector."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from distgan.errors import UnreadableSampleError

_HEADER_BYTES = 128
"""Size of the header that NumPy writes before the data of a vector."""
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_DTYPES = ("<f4", "<f8")


def decode_into(out: NDArray[np.float32], data: bytes | memoryview, extension: str = "npy") -> None:
    """Decode a vector in NumPy's format into `out`, float32 (dimensions,).

    Raises:
        UnreadableSampleError: the vector has another dtype or size, is damaged, or is not finite in float32.
    """
    try:
        dtype, shape, start = _read_header(bytes(data[:_HEADER_BYTES]))
    except Exception as error:  # NumPy parses a Python literal, which raises many exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableSampleError(f"is not in NumPy's format: {reason[:200]}") from None
    if dtype.str not in _DTYPES or shape != out.shape:
        raise UnreadableSampleError(
            f"wrong array: found {dtype.str} of shape {shape}, expected <f4 or <f8 of shape ({len(out)},) "
            "(data.dimensions)"
        )
    if len(data) != start + dtype.itemsize * len(out):
        raise UnreadableSampleError(
            f"wrong size: found {len(data)} bytes, expected {start + dtype.itemsize * len(out)} from its header"
        )
    with np.errstate(over="ignore"):
        out[...] = np.frombuffer(data, dtype, len(out), start)
    if not np.isfinite(out).all():
        raise UnreadableSampleError("holds numbers that are not finite in float32")


def encode(point: NDArray[np.float32]) -> bytes:
    """Encode a vector in NumPy's format, as little-endian float32."""
    file = io.BytesIO()
    npy.write_array(file, point.astype("<f4"), version=(1, 0), allow_pickle=False)
    return file.getvalue()


@lru_cache(maxsize=64)  # parsing is the slowest step, and the headers of a data set are equal
def _read_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return dtype and shape of an array, and the byte offset of its data."""
    file = io.BytesIO(head)
    version = npy.read_magic(file)
    if version not in _READ_HEADER:
        raise ValueError(f"version {version} is not one of {', '.join(map(str, _READ_HEADER))}")
    shape, _, dtype = _READ_HEADER[version](file, max_header_size=_HEADER_BYTES)
    return dtype, shape, file.tell()
