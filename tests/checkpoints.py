"""Checkpoints whose content follows from their step, and others that somebody has changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from distgan.checkpoint.loading import load_sets, load_state
from distgan.checkpoint.writer import CheckpointWriter


def contents(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of which every element depends on the step."""
    return {
        "generator": {"weight": torch.arange(3000.0).view(50, 60) + step, "bias": torch.full((7,), step).half()},
        "counters": {"step": torch.tensor(step)},
    }


def save(writer: CheckpointWriter, step: int) -> bool:
    return writer.save(step, contents(step), {"step": step}, blocking=True)


def assert_holds(path: Path, step: int) -> None:
    """The checkpoint has exactly what `contents` says of its step."""
    assert_sets(path, step)
    assert load_state(path) == {"step": step}


def assert_sets(path: Path, step: int) -> None:
    """The checkpoint has the tensors that `contents` says of a step, and any state."""
    loaded = load_sets(path, ["generator", "counters"])
    for name, tensors in contents(step).items():
        assert loaded[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert loaded[name][key].dtype == tensor.dtype
            assert torch.equal(loaded[name][key], tensor)


def step_of(path: Path | None) -> int:
    assert path is not None
    return int(path.name.removeprefix("step-"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage_flip(path: Path) -> None:
    content = bytearray((path / "generator.1-of-1.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "generator.1-of-1.safetensors").write_bytes(content)


def rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """Change a file of a checkpoint as somebody would who knows the manifest."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
