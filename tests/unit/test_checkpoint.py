"""Writing checkpoints: what is on disk is always whole, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distgan.checkpoint import directory, writer
from distgan.checkpoint.directory import newest_valid, read_best
from distgan.checkpoint.loading import load_sets, load_state
from distgan.checkpoint.snapshot import Snapshot
from distgan.checkpoint.writer import CheckpointWriter
from tests.checkpoints import assert_holds, contents, names, save
from tests.disks import small_disk


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make the writing thread wait for the event before each file."""
    go = threading.Event()
    write = writer.write_file

    def held(*arguments: object) -> object:
        assert go.wait(30)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_file", held)
    return go


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_directory_is_as_documented(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=2)) as writer:
        assert save(writer, 60)
    path = folder / "step-00000060"
    assert names(folder) == ["latest", "step-00000060"]
    assert directory.newest_step(folder) == 60
    assert (folder / "latest").read_text() == "step-00000060\n"
    assert names(path) == [
        "counters.1-of-1.safetensors", "generator.1-of-1.safetensors", "layout.json", "manifest.json", "state.json",
    ]  # fmt: skip
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["step"] == 60
    for name in ("counters.1-of-1.safetensors", "generator.1-of-1.safetensors", "layout.json", "state.json"):
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert newest_valid(folder) == path
    assert_holds(path, 60)


def test_the_safetensors_library_reads_every_kind_of_tensor(folder: Path) -> None:
    base = torch.randn(6, 10)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1).expand(5),
        "shared": base,
        "shared too": base,
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "zero-dimensional": torch.tensor(3.5, dtype=torch.float64),
        "none of it": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "name / with.dots é": torch.tensor([-1, 2**40]),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        tensors[str(dtype)] = torch.tensor([1, 0, 1]).to(dtype)
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        writer.save(1, {"all": tensors, "empty": {}}, {}, blocking=True)
    path = folder / "step-00000001"
    for read in (safetensors.torch.load_file(path / "all.1-of-1.safetensors"), load_sets(path, ["all"])["all"]):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype, name
            assert read[name].shape == tensor.shape, name
            assert torch.equal(read[name], tensor), name
    assert load_sets(path, ["empty"]) == {"empty": {}}


def test_host_memory_is_reused_until_the_layout_changes() -> None:
    snapshot = Snapshot()
    snapshot.copy({"a": torch.zeros(4)})
    memory = snapshot._data.data_ptr()
    snapshot.copy({"a": torch.ones(4)})
    assert snapshot._data.data_ptr() == memory
    snapshot.copy({"a": torch.ones(4), "b": torch.ones(3)})
    written = safetensors.torch.load(b"".join(snapshot.chunks()))
    assert torch.equal(written["b"], torch.ones(3))


def test_changes_after_the_copy_do_not_reach_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = hold_writes(monkeypatch)
    files, state = contents(5), {"step": 5, "list": [1]}
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        assert writer.save(5, files, state)
        state["list"].append(2)  # type: ignore[attr-defined]
        writer.copied()
        for tensors in files.values():
            for tensor in tensors.values():
                tensor.add_(1)
        go.set()
    path = folder / "step-00000005"
    assert torch.equal(load_sets(path, ["generator"])["generator"]["weight"], contents(5)["generator"]["weight"])
    assert load_state(path)["list"] == [1]


def test_a_second_save_is_skipped_while_the_first_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go = hold_writes(monkeypatch)
    with closing(CheckpointWriter(folder, keep=5)) as writer:
        assert writer.save(1, contents(1), {"step": 1})
        assert not writer.save(2, contents(2), {"step": 2})
        assert "step 2 skipped" in caplog.text
        assert "the checkpoint of step 1 is still being written" in caplog.text
        threading.Timer(0.05, go.set).start()
        assert writer.save(3, contents(3), {"step": 3}, blocking=True)
    assert sorted(directory.steps(folder)) == [1, 3]
    assert_holds(folder / "step-00000001", 1)
    assert_holds(folder / "step-00000003", 3)
    assert writer.failures == 0


def test_keeps_the_newest_and_the_best(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=2)) as writer:
        for step in (10, 20, 30, 40, 50):
            save(writer, step)
            if step == 20:
                assert writer.mark_best(20, 3.25, "fid[classifier]")
        assert names(folder) == ["best.json", "latest", "step-00000020", "step-00000040", "step-00000050"]
        best = read_best(folder)
        assert best is not None
        assert (best.step, best.value, best.metric) == (20, 3.25, "fid[classifier]")
        assert writer.mark_best(50, 3.0, "fid[classifier]")
        save(writer, 60)
    assert sorted(directory.steps(folder)) == [50, 60]


def test_a_step_without_checkpoint_is_not_marked_best(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 1)
        writer.mark_best(1, 5.0, "fid")
        assert not writer.mark_best(2, 4.0, "fid")
    best = read_best(folder)
    assert best is not None
    assert best.step == 1
    assert "no checkpoint of step 2" in caplog.text


def test_a_full_disk_lets_training_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(CheckpointWriter(folder, keep=1)) as writer:
        save(writer, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert not save(writer, 2)
        assert writer.failures == 1
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        message = record.getMessage()
        assert "\n" not in message
        assert "step 2 failed: No space left on device: " in message
        assert "it needs 0.0 MB; " in message
        assert "step-00000001" in message
        assert names(folder) == ["latest", "step-00000001"]
        assert save(writer, 3), "the next one tries again"
    assert names(folder) == ["latest", "step-00000003"]


def test_a_disk_that_is_really_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "small", megabytes=1) as disk:
        folder = disk.point / "checkpoints"
        with closing(CheckpointWriter(folder, keep=3)) as writer:
            assert save(writer, 1)
            large = {"generator": {"weight": torch.zeros(2 << 20, dtype=torch.uint8)}}
            assert not writer.save(2, large, {}, blocking=True)
            assert "needs 2.1 MB" in caplog.text
            assert f"0.0 of 1.0 MB are free on {disk.point}" in caplog.text
            assert names(folder) == ["latest", "step-00000001"]
            assert save(writer, 3)
        assert newest_valid(folder) == folder / "step-00000003"


def test_a_file_where_the_folder_should_be(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("in the way")
    with closing(CheckpointWriter(folder, keep=1)) as writer:
        assert not save(writer, 1)
    assert writer.failures == 1
    assert folder.read_text() == "in the way"
    assert "step 1 failed" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("out of pinned memory"), MemoryError()], ids=["runtime", "memory"])
@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_copy_that_no_memory_holds_is_a_failed_checkpoint(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    blocking: bool,
    first: bool,
) -> None:
    empty = torch.empty

    def scarce(size: int, **options: object) -> torch.Tensor:
        if size:
            raise error
        return empty(size, **options)  # type: ignore[call-overload,no-any-return]

    larger = {"generator": {"weight": torch.zeros(100_000)}, "counters": {}}
    with closing(CheckpointWriter(folder, keep=5)) as writer:
        if not first:
            assert save(writer, 1)
        good = writer.last_good
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", scarce)
            assert writer.save(2, larger, {}, blocking=blocking) is not blocking
            writer.copied()
            writer.wait()
        assert writer.failures == 1
        assert writer.last_good == good
        assert "step 2 failed" in caplog.text
        assert "it needs 0.4 MB" in caplog.text
        assert not (folder / "step-00000002").exists()
        assert save(writer, 3), "there is memory again"
    assert_holds(folder / "step-00000003", 3)


def test_an_unfinite_state_is_refused_at_once(folder: Path) -> None:
    with closing(CheckpointWriter(folder, keep=1)) as writer, pytest.raises(ValueError, match="JSON"):
        writer.save(1, contents(1), {"loss": float("nan")})
