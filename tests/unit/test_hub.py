"""Exports that are loaded from a stand-in of the Hugging Face Hub: real HTTP, and the real client."""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distgan.errors import UserError
from distgan.inference import hub
from distgan.inference.export import load_generator
from distgan.inference.publish import publish
from tests.hub_server import HubServer, Repository, hub_server
from tests.unit.test_export import DESCRIPTION, content, write


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(tmp_path) as running:
        yield running


def hosted(server: HubServer, folder: Path, **more: bytes) -> str:
    """Put an export on the stand-in, with more files, and return its commit."""
    server.repositories["someone/gan"] = Repository()
    return server.repositories["someone/gan"].commit({**content(folder), **more})


def test_a_server_that_dies_during_a_download(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted(server, write(tmp_path / "source"))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.cut = 5000
    with pytest.raises(UserError, match=r"hf://someone/gan: cannot be downloaded: .*; check the network"):
        load_generator("hf://someone/gan")
    server.cut = None
    assert load_generator("hf://someone/gan").step == 5


def test_a_full_disk(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted(server, write(tmp_path / "source"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be downloaded: No space left on device; free space there, or set HF_"):
        load_generator("hf://someone/gan")


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


def test_other_files_stay_there(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extra = {"pytorch_model.bin": pickle.dumps(Bomb()), "a/model.safetensors": b"x", "setup.py": b"raise SystemExit"}
    hosted(server, write(tmp_path / "source"), **extra)
    assert load_generator("hf://someone/gan").step == 5
    cached = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert cached == {"config.json", "model.safetensors"}
    assert not Path("exploded").exists()
    # A pickle under the name of the weights is refused by the reader of safetensors.
    hosted(server, tmp_path / "source", **{"model.safetensors": pickle.dumps(Bomb())})
    with pytest.raises(UserError, match=r"model\.safetensors: not the weights of this generator"):
        load_generator("hf://someone/gan")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_are_too_large_are_not_downloaded(tmp_path: Path, server: HubServer, name: str) -> None:
    hosted(server, write(tmp_path / "source"))
    server.sizes[name] = 17 << 30
    with pytest.raises(UserError, match=rf"hf://someone/gan: {re.escape(name)} has 18,253,611,008 bytes"):
        load_generator("hf://someone/gan")
    assert not [request for request in server.requests if "/resolve/" in request]


def test_repositories_that_are_no_export(tmp_path: Path, server: HubServer) -> None:
    with pytest.raises(UserError, match=r"hf://someone/gan: cannot be downloaded: there is no such repository"):
        load_generator("hf://someone/gan")
    server.repositories["someone/gan"] = Repository()
    server.repositories["someone/gan"].commit({"README.md": b"hello"})
    with pytest.raises(UserError, match=r"hf://someone/gan: has no config\.json, so it is not an export"):
        load_generator("hf://someone/gan")
    with pytest.raises(UserError, match=r"@v9: cannot be downloaded: there is no such revision"):
        load_generator("hf://someone/gan@v9")
    hosted(server, write(tmp_path / "source"))
    with pytest.raises(UserError, match="--best needs a run folder, found an export"):
        load_generator("hf://someone/gan", best=True)


def test_a_name_that_the_hub_does_not_allow(server: HubServer) -> None:
    with pytest.raises(UserError, match=r"hf://a/b\.git: cannot be downloaded: HFValidationError: .*; check the name"):
        load_generator("hf://a/b.git")


def test_a_strangers_code_is_not_run(tmp_path: Path, server: HubServer) -> None:
    strange = {**DESCRIPTION, "generator": {"architecture": "stranger.nets:Generator", "latent_size": 8}}
    hosted(server, write(tmp_path / "source", strange))
    with pytest.raises(UserError, match="--allow stranger"):
        load_generator("hf://someone/gan")


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://x",
        "hf://a/b/c",
        "hf://../b",
        "hf://a/..",
        "hf://a/b@",
        "hf://a/b@../../x",
        "hf://a/b@x\n",
        "hf://a/b?c",
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UserError, match="expected hf://USER/NAME"):
        load_generator(address)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_installed", lambda _: False)
    for fails in (lambda: load_generator("hf://a/b"), lambda: publish(tmp_path, tmp_path / "out", "a/b")):
        with pytest.raises(UserError, match=r"a/b: .* is not installed; pip install 'distgan\[hub\]'"):
            fails()
