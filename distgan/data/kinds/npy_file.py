"""Files in NumPy's format with one array, read without pickle and with bounded headers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from distgan.errors import UnreadableSampleError

HEADER_BYTES = 128
"""Size of the header that NumPy writes before the data of an array of few dimensions."""
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_header(data: bytes | memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return dtype and shape of an array in C order, and the byte offset of its data. Raises UnreadableSampleError."""
    try:
        return _read_header(bytes(data[:HEADER_BYTES]))
    except Exception as error:  # NumPy parses a Python literal, which raises many exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableSampleError(f"is not in NumPy's format: {reason[:200]}") from None


def read_array(data: bytes | memoryview, dtypes: Sequence[str]) -> NDArray[Any]:
    """Return the array of a file, which shares its memory.

    Raises:
        UnreadableSampleError: it is damaged, or has none of these dtypes, such as `<f4`.
    """
    dtype, shape, start = read_header(data)
    if dtype.str not in dtypes:
        raise UnreadableSampleError(f"wrong array: found {dtype.str}, expected {' or '.join(dtypes)}")
    size = start + dtype.itemsize * math.prod(shape)
    if min(shape, default=0) < 0 or len(data) != size:
        raise UnreadableSampleError(f"wrong size: found {len(data)} bytes, expected {size} from its header")
    return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)


def to_bytes(values: NDArray[np.floating]) -> bytes:
    """Return a file with an array, little-endian and in its own precision."""
    file = io.BytesIO()
    little_endian = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    npy.write_array(file, little_endian, version=(1, 0), allow_pickle=False)
    return file.getvalue()


@lru_cache(maxsize=64)  # parsing is the slowest step, and the headers of a data set are equal
def _read_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    file = io.BytesIO(head)
    version = npy.read_magic(file)
    if version not in _READ_HEADER:
        raise ValueError(f"version {version} is not one of {', '.join(map(str, _READ_HEADER))}")
    shape, is_fortran, dtype = _READ_HEADER[version](file, max_header_size=HEADER_BYTES)
    if is_fortran and len(shape) > 1:
        raise ValueError("the array is in Fortran order, expected C order")
    return dtype, shape, file.tell()
