"""Which file of a checkpoint holds which part of which tensor: `layout.json` and the safetensors files.

    NAME.r-of-W.safetensors     what rank r - 1 of W ranks wrote of the set NAME; missing if it had nothing to write
    layout.json                 {version, world_size, sets: {NAME: {TENSOR: {dtype, shape, parts: [[r, start], ...]}}}}

`parts` lists the files in the order of the tensor's elements, with the row-major index of the first element in each. A
part ends where the next one starts, so parts have neither gaps nor overlaps. A tensor that one file holds whole has its
own shape there. Any number of ranks can read what any number of ranks wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distgan.checkpoint.directory import USE_OLDER, Manifest, Record, read_manifest, read_record
from distgan.checkpoint.snapshot import DTYPE_NAMES, DTYPES
from distgan.distributed.parts import Part, Stored
from distgan.errors import UserError, printable
from distgan.files import reason

FILE = "layout.json"
_LIMIT = 256 << 20

Count = Annotated[int, Field(ge=0, lt=2**62)]


class TensorLayout(Record):
    """Type and shape of one tensor, and its parts."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[Count], Field(max_length=32)]
    parts: Annotated[list[tuple[Annotated[int, Field(ge=1)], Count]], Field(min_length=1)]
    """Number of a file, from 1, and index of the first element in it."""

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return file, first element and end of each part. Raises ValueError if they are not the whole tensor."""
        size = 1
        for length in self.shape:
            size *= length
        starts = [start for _, start in self.parts]
        ends = [*starts[1:], size]
        if starts[0] != 0 or any(start >= end for start, end in zip(starts, ends, strict=True) if size):
            raise ValueError(f"parts that start at {starts[:10]}, expected rising numbers from 0 below {size}")
        if len({file for file, _ in self.parts}) < len(self.parts) or size >= 2**62:
            raise ValueError("two parts in one file" if size < 2**62 else "too many elements")
        return [(file, start, end) for (file, start), end in zip(self.parts, ends, strict=True)]


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=100)]
"""Without dots and separators, so that the file names made of it stay in the directory and differ."""


class Layout(Record):
    """Content of layout.json."""

    version: Literal[1] = 1
    world_size: Annotated[int, Field(ge=1, le=1 << 20)]
    sets: dict[SetName, dict[str, TensorLayout]]


def file_name(name: str, number: int, world_size: int) -> str:
    """Return the name of the file that rank `number` - 1 wrote of a set of tensors."""
    return f"{name}.{number}-of-{world_size}.safetensors"


Ranges = Mapping[str, Mapping[str, tuple[int, int]]]
"""Set -> tensor -> first element and number of elements that one rank wrote. Without tensors it wrote nothing of."""


def is_written(part: Part, rank: int) -> bool:
    """Return True if a rank writes this part of its own. Rank 0 writes empty tensors."""
    return part.values.numel() > 0 or (part.shape.numel() == 0 and rank == 0)


def make_layout(sets: Mapping[str, Mapping[str, Part]], written: Sequence[Ranges]) -> Layout:
    """Return the layout of what each rank wrote.

    Args:
        sets: the parts of any rank, for their types and shapes.
        written: of each rank, in order.

    Raises:
        ValueError: the parts of a tensor are not the whole tensor.
    """
    found: dict[str, dict[str, TensorLayout]] = {name: {} for name in sets}
    for name, tensors in sets.items():
        for key, part in tensors.items():
            parts = [(rank + 1, *ranges[name][key]) for rank, ranges in enumerate(written) if key in ranges[name]]
            parts.sort(key=lambda part: part[1])
            layout = TensorLayout.model_construct(
                dtype=DTYPE_NAMES[part.values.dtype], shape=list(part.shape), parts=[part[:2] for part in parts]
            )
            if not parts or [(number, start, start + size) for number, start, size in parts] != layout.ranges():
                raise ValueError(f"{name}: {key}: the ranks did not write each element once: {parts[:10]}")
            found[name][key] = layout
    return Layout.model_construct(version=1, world_size=len(written), sets=found)


def read_sets(path: Path, names: Iterable[str]) -> dict[str, dict[str, Stored]]:
    """Return the tensors of some sets of a checkpoint, which stay in their files until they are read.

    The files are memory-mapped: do not keep the result, because they may be pruned. Call `verify` first.

    Raises:
        UserError: a set or file is missing, or the layout does not fit the files; the message names the file.
    """
    manifest, layout = read_manifest(path), read_layout(path)
    for name in (names := list(names)):
        if name not in layout.sets:
            raise UserError(f"{path}: has no {name}; it has {', '.join(sorted(layout.sets))}")
    return {name: _read_set(path, name, layout, manifest) for name in names}


def read_layout(path: Path) -> Layout:
    """Return the layout of a checkpoint. Raises UserError if it is missing or damaged."""
    return read_record(path / FILE, Layout, limit=_LIMIT)


def _read_set(path: Path, name: str, layout: Layout, manifest: Manifest) -> dict[str, Stored]:
    expected: dict[int, dict[str, tuple[int, int]]] = {}
    for key, tensor in layout.sets[name].items():
        try:
            for number, start, end in tensor.ranges():
                expected.setdefault(number, {})[key] = start, end
        except ValueError as error:
            raise _damaged(path, name, key, str(error)) from None
    parts: dict[str, list[tuple[int, Tensor]]] = {key: [] for key in layout.sets[name]}
    for number, ranges in expected.items():
        file = path / file_name(name, number, layout.world_size)
        if number > layout.world_size or file.name not in manifest.files:
            raise UserError(f"{path / FILE}: {name}: names {file.name}, which manifest.json does not; {USE_OLDER}")
        for key, values in _mapped(file).items():
            if key not in ranges:
                raise _damaged(path, name, key, f"{file.name} has it")
            start, end = ranges.pop(key)
            tensor = layout.sets[name][key]
            whole = end - start == torch.Size(tensor.shape).numel()
            fits = list(values.shape) == tensor.shape if whole else values.numel() == end - start
            if not fits or values.dtype != DTYPES[tensor.dtype]:
                found = f"{file.name} has {values.dtype} of shape {tuple(values.shape)}"
                raise _damaged(path, name, key, f"{tensor.dtype}, elements {start} to {end}, but {found}")
            parts[key].append((start, values))
        if ranges:
            raise _damaged(path, name, min(ranges), f"{file.name} does not have it")
    return {
        key: Stored(DTYPES[tensor.dtype], tensor.shape, sorted(parts[key], key=lambda part: part[0]))
        for key, tensor in layout.sets[name].items()
    }


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {reason(error)}; {USE_OLDER}") from None


def _damaged(path: Path, name: str, key: str, what: str) -> UserError:
    return UserError(f"{path / FILE}: {name}: {printable(key)[:200]}: found {what}; {USE_OLDER}")
