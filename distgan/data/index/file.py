"""The index file, `index.safetensors`: arrays are stored as tensors, the shard table as JSON metadata."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from distgan.data.index.table import ARRAYS
from distgan.data.kinds.latents import StoredLatents
from distgan.data.storage import locations
from distgan.errors import UserError

INDEX_NAME = "index.safetensors"
SUFFIX = ".safetensors"
_METADATA_KEY = "distgan_index"
_OLDER = (1,)
_MAX_HEADER_BYTES = 256 << 20
_DTYPE_NAMES = {"i8": "I64", "i4": "I32", "u4": "U32", "u1": "U8"}


def index_path(where: str | os.PathLike[str]) -> str:
    """Return the normalized path of the index file: `where` if it ends in .safetensors, else a file inside `where`."""
    path = locations.normalize(os.fspath(where))
    return path if locations.without_query(path).endswith(SUFFIX) else locations.join(path, INDEX_NAME)


class Table(BaseModel):
    """The stored shard table. Each shard is (name, bytes, samples, header digest, SHA-256 of the whole file)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[2]
    shards: list[tuple[str, NonNegativeInt, PositiveInt, str, str | None]]
    class_names: list[str] | None
    vocabulary: list[str] | None = None
    latents: StoredLatents | None = None
    left_out: list[str] = []
    """Names of shards without samples."""


def pack_file(table: Table, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Serialize the shard table and the arrays to the bytes of an index file."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous, metadata={_METADATA_KEY: table.model_dump_json()})


def read_file(file: str, name: str) -> tuple[Table, dict[str, NDArray[Any]]]:
    """Return the shard table and the memory-mapped arrays of an index file. Messages call the file `name`.

    A safetensors file is 8 bytes of header length, a JSON header, then the tensors' bytes. Raises UserError.
    """
    wrong = "run `distgan index` on the shards"
    try:
        with open(file, "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot read the index: {getattr(error, 'strerror', None) or error}; {wrong}"
        ) from None
    length = int.from_bytes(mapped[:8], "little")
    try:
        if not 0 < length <= min(len(mapped) - 8, _MAX_HEADER_BYTES):
            raise ValueError("found no safetensors header")
        header = json.loads(mapped[8 : 8 + length])
        described = json.loads(header["__metadata__"][_METADATA_KEY])
        if (version := described.get("version")) in _OLDER:
            raise UserError(f"{name}: found an index of version {version}, expected 2; {wrong}")
        table = Table.model_validate_json(header["__metadata__"][_METADATA_KEY])
        arrays = {array: _array(mapped, 8 + length, header[array], ARRAYS[array]) for array in ARRAYS}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not an index file: {type(error).__name__}: {reason}; {wrong}") from None
    return table, arrays


def _array(mapped: mmap.mmap, base: int, entry: dict[str, Any], kind: np.dtype[Any]) -> NDArray[Any]:
    start, stop = entry["data_offsets"]
    (length,) = entry["shape"]
    if entry["dtype"] != _DTYPE_NAMES[kind.str[1:]] or not all(type(n) is int for n in (start, stop, length)):
        raise ValueError(f"expected a vector of {kind}")
    if not (0 <= start <= stop <= len(mapped) - base and stop - start == length * kind.itemsize):
        raise ValueError("a tensor lies outside the file")
    return np.frombuffer(mapped, kind, length, base + start)
