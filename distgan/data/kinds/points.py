"""Decode and encode points. Each point is an .npy file of one little-endian float32 or float64 vector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distgan.data.kinds import npy_file
from distgan.errors import UnreadableSampleError

_DTYPES = ("<f4", "<f8")


def decode_into(out: NDArray[np.float32], data: bytes | memoryview, extension: str = "npy") -> None:
    """Decode a vector in NumPy's format into `out`, float32 (dimensions,).

    Raises:
        UnreadableSampleError: the vector has another dtype or size, is damaged, or is not finite in float32.
    """
    dtype, shape, start = npy_file.read_header(data)
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
    return npy_file.to_bytes(point.astype("<f4"))
