"""Cache files of evaluation: safetensors with a checksum, written atomically."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distgan.files import disk_errors, reason, write_atomically

log = logging.getLogger("distgan")


class Entry(NamedTuple):
    """Tensors by name (on the CPU), and numbers or names about them."""

    tensors: dict[str, Tensor]
    facts: dict[str, float | str]


def read(path: Path) -> Entry | None:
    """Read the entry that `write` wrote; None if the file is missing, or, with a warning, damaged."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: the cached file is damaged: %s; computing it again", path, error)
        return None


def parse(content: bytes) -> Entry:
    """Return the entry in the content of a file that `write` wrote. Raises ValueError if it is damaged."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"]["facts"])
        tensors = load(content)
        intact = header["__metadata__"]["sha256"] == digest(tensors)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(reason(error)) from None
    if not intact:
        raise ValueError("its checksum does not match")
    return Entry(tensors, facts)


def write(path: Path, entry: Entry) -> None:
    """Write an entry atomically: readers and other writers see the old file or the new one, never a part.

    A folder that cannot be written to only causes a warning.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    content = save(tensors, {"facts": json.dumps(entry.facts), "sha256": digest(tensors)})
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        log.warning("%s: cannot write the cached file: %s; or set evaluation.cache_dir", path, reason(error))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of the names, dtypes, shapes and contents of CPU tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return total.hexdigest()


def key(*parts: object) -> str:
    """Return a short file-name part that identifies these values."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:24]
