"""Write a checkpoint as one plain safetensors file per set of tensors, whatever number of ranks wrote it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from distgan.checkpoint import layout
from distgan.checkpoint.directory import JSON_LIMIT, Manifest, read_manifest, write_file
from distgan.checkpoint.loading import find_checkpoint
from distgan.checkpoint.snapshot import header, ordered
from distgan.data.storage.locations import local_path
from distgan.distributed.parts import Part, Stored
from distgan.errors import UserError
from distgan.files import publish_folder, read_bounded, sync_folder, writing

_CHUNK = 2 << 20
"""Number of elements that are read at once."""


def merge(source: str | os.PathLike[str], destination: str | os.PathLike[str], *, best: bool = False) -> Path:
    """Write a run's newest checkpoint, or one checkpoint, as NAME.1-of-1.safetensors files. Return the new folder.

    The result is a checkpoint of the same content, from which a run can resume. Its tensors pass through memory in
    pieces of some megabytes.

    Args:
        best: take the best checkpoint of a run.

    Raises:
        UserError: there is no valid checkpoint, or the folder exists or cannot be written.
    """
    target = local_path(destination, "--out")
    found = find_checkpoint(source, best=best)
    sets = layout.read_sets(found, layout.read_layout(found).sets)
    with writing(target, "the checkpoint"):
        write_merged(target, sets, read_bounded(found / "state.json", JSON_LIMIT), read_manifest(found).step)
    return target


def write_merged(target: Path, sets: Mapping[str, Mapping[str, Stored]], state: bytes, step: int) -> None:
    """Write whole tensors as a new checkpoint in one file per set.

    Args:
        target: folder to create; it appears when it is complete.
        state: content of state.json.

    Raises:
        UserError: the folder exists.
        OSError: it cannot be written.
    """
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; remove it, or name another folder with --out")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    parts = {
        name: {key: Part(torch.empty(0, dtype=stored.dtype), 0, stored.shape) for key, stored in tensors.items()}
        for name, tensors in sets.items()
    }
    ranges = {name: {key: (0, part.shape.numel()) for key, part in of.items()} for name, of in parts.items()}
    try:
        temporary.mkdir(parents=True)
        contents = {layout.file_name(name, 1, 1): _chunks(tensors) for name, tensors in sets.items() if tensors}
        contents[layout.FILE] = iter([layout.make_layout(parts, [ranges]).model_dump_json().encode()])
        contents["state.json"] = iter([state])
        files = {name: write_file(temporary / name, chunks) for name, chunks in contents.items()}
        manifest = Manifest(step=step, files=files).model_dump_json(indent=1).encode()
        write_file(temporary / "manifest.json", [manifest])
        sync_folder(temporary)
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chunks(tensors: Mapping[str, Stored]) -> Iterator[bytes | memoryview]:
    order = ordered(tensors)
    yield header(order)
    for name, _, _ in order:
        size = tensors[name].shape.numel()
        for start in range(0, size, _CHUNK):
            elements = tensors[name].elements(start, min(start + _CHUNK, size))
            yield memoryview(elements.view(torch.uint8).numpy())  # type: ignore[arg-type]
