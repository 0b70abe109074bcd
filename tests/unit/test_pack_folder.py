"""The folder that pack writes: it appears whole or not at all, and what is not its own stays."""

from __future__ import annotations

import fcntl
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distgan.data.index.loading import load_index
from distgan.data.packing.pack import pack
from distgan.data.packing.sources.opening import open_source
from distgan.errors import UserError
from distgan.files import new_file
from tests.sources import digests, numbered_images, write_idx, write_tree


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return numbered_images(tmp_path / "images", 50)


def test_a_folder_that_is_not_empty(images: Path, tmp_path: Path) -> None:
    out = write_tree(tmp_path / "out", {"precious.txt": b"-"})
    with pytest.raises(UserError, match=r"out: .*not empty"):
        pack(images, out, workers=1)
    with pytest.raises(UserError, match=r"out: found precious\.txt, "):
        pack(images, out, workers=1, overwrite=True)
    assert digests(out).keys() == {"precious.txt"}


def test_overwriting_shards(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pack(images, tmp_path / "out", shard_size=10, workers=1)
    with pytest.raises(UserError, match=r"out: .*not empty.* --overwrite"):
        pack(images, tmp_path / "out", workers=1)
    pack(images, tmp_path / "out", shard_size=40, workers=1, overwrite=True)
    pack(images, tmp_path / "fresh", shard_size=40, workers=1)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("stranger", ["train.tar", "shard-0.tar", "index.safetensors.old", ".index.safetensors"])
def test_only_what_pack_wrote_is_removed(images: Path, tmp_path: Path, stranger: str) -> None:
    pack(images, tmp_path / "out", workers=1)
    write_tree(tmp_path / "out", {stranger: b"-"})
    with pytest.raises(UserError, match=rf"out: found {re.escape(stranger)}, "):
        pack(images, tmp_path / "out", workers=1, overwrite=True)
    write_tree(tmp_path / "new.partial", {stranger: b"-"})
    with pytest.raises(UserError, match=rf"new\.partial: found {re.escape(stranger)}, "):
        pack(images, tmp_path / "new", workers=1)
    assert digests(tmp_path / "new.partial").keys() == {stranger}


def test_the_index_of_a_killed_pack_is_removed(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    with new_file(folder / "index.safetensors") as temporary:
        temporary.write_bytes(b"whole")
    temporary.write_bytes(b"half")
    pack(images, tmp_path / "out", workers=1)
    pack(images, tmp_path / "fresh", workers=1)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_shards_without_an_index_are_not_overwritten(images: Path, tmp_path: Path) -> None:
    out = write_tree(tmp_path / "out", {"shard-000000.tar": b"-"})
    with pytest.raises(UserError, match=r"without index\.safetensors"):
        pack(images, out, workers=1, overwrite=True)
    assert digests(out).keys() == {"shard-000000.tar"}


@pytest.mark.parametrize("step", range(3))
def test_a_killed_overwrite_leaves_whole_shards(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    pack(images, tmp_path / "out", shard_size=10, workers=1)
    pack(images, tmp_path / "new", shard_size=40, workers=1)
    old, new = digests(tmp_path / "out"), digests(tmp_path / "new")
    steps = itertools.count()

    def killed_before(act: Callable[..., Any], folder: str) -> Callable[..., Any]:
        def acting(path: Path, *arguments: Any, **named: Any) -> Any:
            if str(path).startswith(str(tmp_path / folder)) and next(steps) == step:
                raise KeyboardInterrupt
            return act(path, *arguments, **named)

        return acting

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_before(Path.rename, "out"))
        patch.setattr(shutil, "rmtree", killed_before(shutil.rmtree, ".out"))
        with pytest.raises(KeyboardInterrupt):
            pack(images, tmp_path / "out", shard_size=40, workers=1, overwrite=True)
    assert not (tmp_path / "out").exists() or digests(tmp_path / "out") in (old, new)
    with pytest.raises(UserError, match=r"out: .*not empty.* --overwrite"):
        pack(images, tmp_path / "out", workers=1)
    assert digests(tmp_path / "out") == (new if step == 2 else old)
    pack(images, tmp_path / "out", shard_size=40, workers=1, overwrite=True)
    assert digests(tmp_path / "out") == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "new", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_the_folder_while_packing_stays(images: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()

    def save(done: int, total: int) -> None:
        write_tree(tmp_path / "out", {"thesis.doc": b"-"})

    with pytest.raises(UserError, match=r"out: .*complete in \S+out\.partial: ") as error:
        pack(images, tmp_path / "out", workers=1, progress=save, overwrite=overwrite)
    assert "\n" not in str(error.value)
    assert digests(tmp_path / "out").keys() == {"thesis.doc"}
    (tmp_path / "out.partial").rename(tmp_path / "renamed")
    assert len(load_index(str(tmp_path / "renamed"))) == 50


def test_a_pack_that_finished_meanwhile_is_not_replaced(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_first(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        pack(images, tmp_path / "out", shard_size=10, workers=1)
        return open_source(*arguments, **options)

    monkeypatch.setattr("distgan.data.packing.pack.open_source", other_first)
    with pytest.raises(UserError, match=r"out: .*not empty.* --overwrite"):
        pack(images, tmp_path / "out", workers=1, progress=lambda done, total: pytest.fail("it was packed in vain"))
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5
    assert not (tmp_path / "out.partial").exists()


def test_a_failed_overwrite_leaves_the_old_shards(images: Path, tmp_path: Path) -> None:
    pack(images, tmp_path / "out", workers=1)
    before = digests(tmp_path / "out")
    (images / "a" / "003.png").write_bytes(b"-")
    with pytest.raises(UserError, match=r"a/003\.png"):
        pack(images, tmp_path / "out", workers=1, overwrite=True)
    assert digests(tmp_path / "out") == before


def test_wrong_destinations(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for dest, message in [
        (tmp_path / "file", "/file: found a file"),
        (tmp_path / "file" / "below", "cannot be written: File exists"),
        ("/", "found a mount point"),
        ("s3://bucket/shards", "a URL"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            pack(images, dest, workers=1)
        assert "\n" not in str(error.value)


def test_a_full_disk(images: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"out: .*File too large; "):
            pack(images, tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_two_packs_to_one_folder(images: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="out: another pack "):
        pack(images, tmp_path / "out", workers=1)
    os.close(descriptor)
    pack(images, tmp_path / "out", workers=1)


def test_a_stranger_named_partial_is_left_alone(images: Path, tmp_path: Path) -> None:
    write_tree(tmp_path / "out.partial", {"thesis.doc": b"-"})
    with pytest.raises(UserError, match=r"found thesis\.doc"):
        pack(images, tmp_path / "out", workers=1)
    assert (tmp_path / "out.partial" / "thesis.doc").exists()


def test_a_killed_pack_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    source = write_idx(tmp_path / "images-idx3-ubyte", np.zeros((20_000, 28, 28)))
    script = (
        f"from distgan.data.packing.pack import pack; pack({str(source)!r}, 'out', shard_size=20, "
        "resolution=256, workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.partial" / "shard-000003.tar").exists():
            assert process.poll() is None, "the pack ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=20)[1] == []  # no orphan waits for work forever
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("index*"))
    images = numbered_images(tmp_path / "images", 20)
    pack(images, tmp_path / "out", workers=1)
    pack(images, tmp_path / "fresh", workers=1)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert not (tmp_path / "out.partial").exists()


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    source = write_idx(tmp_path / "images-idx3-ubyte", np.zeros((20_000, 28, 28)))

    def kill_one(done: int, _: int) -> None:
        if not killed:
            killed.append((set(multiprocessing.active_children()) - others).pop())
            killed[0].kill()

    killed: list[multiprocessing.process.BaseProcess] = []
    others = set(multiprocessing.active_children())

    with pytest.raises(UserError, match=r"^workers 2: .*killed"):
        pack(source, tmp_path / "out", resolution=128, workers=2, progress=kill_one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images-idx3-ubyte"]
