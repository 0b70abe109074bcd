"""Read the files of a checkpoint. Nothing is ever unpickled: tensors are in safetensors files, all else in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from distgan.checkpoint.directory import JSON_LIMIT, read_manifest
from distgan.errors import UserError
from distgan.files import read_bounded, reason


def load_files(path: Path, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, dict[str, Tensor]]:
    """Tensors of some files (without `.safetensors`) of a checkpoint, in memory of their own. `verify` it first.

    Raises:
        UserError: naming the file that is missing or unreadable.
    """
    manifest = read_manifest(path)
    loaded = {}
    for name in names:
        file = path / f"{name}.safetensors"
        if file.name not in manifest.files:
            raise UserError(f"{path}: has no {file.name}; it has {', '.join(sorted(manifest.files))}")
        try:
            tensors = safetensors.torch.load_file(file, device=str(device))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {reason(error)}") from None
        # On the CPU this is a mapping of the file, which may be pruned and, over NFS, vanish from under its readers.
        loaded[name] = {key: value.clone() if value.device.type == "cpu" else value for key, value in tensors.items()}
    return loaded


def load_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises UserError naming the file if it is missing or damaged."""
    file = path / "state.json"
    content = read_bounded(file, JSON_LIMIT)
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {reason(error)}; take another checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(state).__name__}; take another checkpoint")
    return state
