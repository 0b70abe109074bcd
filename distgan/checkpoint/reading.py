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

from distgan.checkpoint.directory import JSON_LIMIT, USE_OLDER, read_manifest
from distgan.errors import UserError
from distgan.files import read_bounded, reason


def load_files(path: Path, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, dict[str, Tensor]]:
    """Load the tensors of some files (names without `.safetensors`) of a checkpoint. Call `verify` first.

    Raises:
        UserError: a file is missing or unreadable; the message names it.
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
            raise UserError(f"{file}: not a readable safetensors file: {reason(error)}; {USE_OLDER}") from None
        # On the CPU, load_file maps the file, which may be pruned and vanish over NFS. Therefore clone the tensors.
        loaded[name] = {key: value.clone() if value.device.type == "cpu" else value for key, value in tensors.items()}
    return loaded


def load_state(path: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint. Raises UserError naming the file if it is missing or damaged."""
    file = path / "state.json"
    content = read_bounded(file, JSON_LIMIT)
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {reason(error)}; {USE_OLDER}") from None
    if not isinstance(state, dict):
        raise UserError(f"{file}: found {type(state).__name__}, expected a JSON object; {USE_OLDER}")
    return state
