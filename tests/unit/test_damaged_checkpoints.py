"""Reading checkpoints, whole, damaged or made by strangers: the newest that verifies, and what is wrong with others."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from distgan.checkpoint.directory import newest_valid, verify
from distgan.checkpoint.loading import load_sets, load_state
from distgan.checkpoint.writer import CheckpointWriter
from distgan.errors import UserError
from tests.checkpoints import contents, damage_flip, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def damage_truncate(path: Path) -> None:
    file = path / "generator.1-of-1.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def damage_missing(path: Path) -> None:
    (path / "counters.1-of-1.safetensors").unlink()


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 50)


def damage_state(path: Path) -> None:
    (path / "state.json").write_text('{"step": 9}')


def damage_symlink(path: Path) -> None:
    """A link that has the size and the content that the manifest speaks of."""
    target = path.parent / "elsewhere"
    target.write_text("x" * len(str(target)))
    (path / "generator.1-of-1.safetensors").unlink()
    (path / "generator.1-of-1.safetensors").symlink_to(target)
    content = target.read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["generator.1-of-1.safetensors"] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_truncate, " bytes, expected "),
        (damage_flip, "generator.1-of-1.safetensors: damaged"),
        (damage_missing, "counters.1-of-1.safetensors: cannot be read"),
        (damage_no_manifest, "manifest.json: cannot be read"),
        (damage_manifest, "manifest.json: damaged"),
        (damage_state, "state.json: damaged"),
        (damage_symlink, "generator.1-of-1.safetensors: not a regular file"),
    ],
)
def test_a_damaged_newest_falls_back_to_the_one_before(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: object, named: str
) -> None:
    with closing(CheckpointWriter(folder, keep=3)) as writer:
        save(writer, 1)
        save(writer, 2)
    damage(folder / "step-00000002")  # type: ignore[operator]
    with pytest.raises(UserError) as raised:
        verify(folder / "step-00000002")
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert newest_valid(folder) == folder / "step-00000001"
    assert named in caplog.text


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\nb", "x" * 300])
def test_a_manifest_cannot_name_a_file_elsewhere(folder: Path, name: str) -> None:
    with closing(CheckpointWriter(folder, keep=3)) as writer:
        save(writer, 1)
    secret = b"secret"
    (folder / "secret").write_bytes(secret)
    manifest = folder / "step-00000001" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"][name] = {"bytes": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    manifest.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"manifest\.json"):
        verify(folder / "step-00000001")
    assert newest_valid(folder) is None


def test_no_folder_and_no_checkpoint(folder: Path) -> None:
    assert newest_valid(folder) is None
    folder.mkdir()
    assert newest_valid(folder) is None
    with pytest.raises(UserError, match="cannot be read"):
        load_state(folder / "step-00000001")


def test_loading_names_what_is_missing_or_damaged(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 1)
    path = folder / "step-00000001"
    with pytest.raises(UserError, match=r"has no other; it has .*generator"):
        load_sets(path, ["other"])
    (path / "generator.1-of-1.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"generator\.1-of-1\.safetensors"):
        load_sets(path, ["generator"])
    for content in ("[1]", "{", "[" * 100_000, ""):
        (path / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"state\.json"):
            load_state(path)


def test_loaded_tensors_do_not_depend_on_the_file(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 1)
    loaded = load_sets(folder / "step-00000001", ["generator"])["generator"]
    # A mapping of it would now be a bus error.
    os.truncate(folder / "step-00000001" / "generator.1-of-1.safetensors", 0)
    assert torch.equal(loaded["weight"], contents(1)["generator"]["weight"])
