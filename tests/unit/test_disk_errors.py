"""Disks that are full, have no inode left or are read-only: one line with path, cause and fix, and nothing is lost."""

from __future__ import annotations

import errno
import gzip
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distgan.checkpoint.directory import newest_valid
from distgan.checkpoint.writer import CheckpointWriter
from distgan.config import DataConfig
from distgan.data import reader
from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.data.index.saving import save_index
from distgan.data.packing.pack import pack
from distgan.data.packing.sources.opening import open_source
from distgan.data.storage import filesystem
from distgan.errors import UserError
from distgan.evaluation import statistics_cache as evaluation_cache
from distgan.evaluation.detectors.published import in_config
from distgan.files import DiskError, disk_errors, explained, write_atomically, writing
from distgan.inference.export import export
from distgan.inference.sample import sample, sample_paths
from distgan.monitoring.tracker import open_tracker
from distgan.published_weights import PublishedFile
from distgan.runs.status import read_status, write_status
from tests.disks import Disk, small_disk
from tests.servers import range_server
from tests.shards import numbered_index, numbers_of, refusal, write_numbered
from tests.unit import test_export

FAULTS: dict[str, tuple[Callable[[Disk], None], str]] = {
    "full": (Disk.fill, "No space left on device: 0.0 of "),
    "inodes": (Disk.use_up_inodes, "no inode left"),
    "read-only": (Disk.forbid, "Read-only file system: "),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", megabytes=4, inodes=100) as mounted:
        yield mounted


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> tuple[Callable[[Disk], None], str]:
    return FAULTS[request.param]


def content(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in names if path.name.partition("-")[0] not in ("ballast", "inode")}


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    return test_export.write(tmp_path / "generator")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


WRITERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "export": lambda disk, generator, photos: export(generator, disk / "exported", overwrite=True),
    "grid": lambda disk, generator, photos: sample(generator, disk / "grid.png", number=4),
    "animation": lambda disk, generator, photos: sample_paths(generator, disk / "paths.gif", steps=3, number=2),
    "pack": lambda disk, generator, photos: pack(photos, disk / "packed", overwrite=True, workers=1),
    "index": lambda disk, generator, photos: write_index(str(disk / "shards")),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_command_ends_in_one_line_and_what_was_there_stays(
    disk: Disk, generator: Path, photos: Path, writer: str, fault: tuple[Callable[[Disk], None], str]
) -> None:
    write_numbered(disk.point / "shards", [2])
    action = WRITERS[writer]
    action(disk.point, generator, photos)
    before = content(disk.point)
    make_ill, cause = fault
    make_ill(disk)
    said = refusal(action, disk.point, generator, photos)
    assert said.startswith(f"{disk.point}/")
    assert cause in said
    assert f"{disk.point}" in said.partition(cause.rstrip(" :"))[2] or f"{disk.point} has no inode" in said
    assert said.isprintable()
    assert content(disk.point) == before


@pytest.mark.parametrize("write", [write_atomically, lambda path, data: filesystem.write(str(path), data)])
def test_the_first_error_of_a_small_file_is_what_is_raised(disk: Disk, write: Any, fault: Any) -> None:
    make_ill, cause = fault
    make_ill(disk)
    with pytest.raises(DiskError) as error:
        write(disk.point / "file", bytes(5000))
    assert cause in str(error.value)
    assert content(disk.point) == {}


def test_samples_that_do_not_fit_leave_whole_files(disk: Disk, generator: Path, fault: Any) -> None:
    make_ill, cause = fault
    make_ill(disk)
    assert cause in refusal(sample, generator, disk.point / "samples")
    assert content(disk.point) == {}


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_run_writes_is_logged_and_tried_again(disk: Disk, caplog: pytest.LogCaptureFixture, fault: Any) -> None:
    run = disk.point
    tensors = {"generator": {"weight": torch.zeros(10)}}
    write_status(run, "running", world_size=1)
    tracker = open_tracker(run, tensorboard=True, resume_step=None, main=True)
    tracker.scalars(1, 1, {"loss": 1.0})
    tracker.close()
    with closing(CheckpointWriter(run / "checkpoints", keep=2)) as writer:
        assert writer.save(1, tensors, {}, blocking=True)
        before = content(run)
        make_ill, cause = fault
        make_ill(disk)
        assert not writer.save(2, tensors, {}, blocking=True)
    tracker = open_tracker(run, tensorboard=True, resume_step=1, main=True)
    for step in range(2, 80):  # more than what is left of a page
        tracker.scalars(step, step, {"loss": 1.0})
    tracker.close()
    assert not write_status(run, "finished", step=3)
    evaluation_cache.write(run / "cache" / "reals", evaluation_cache.Entry({}, {}))
    lines = [record.getMessage() for record in caplog.records]
    for place in ("checkpoints", "status.json", "cache"):
        (line,) = [line for line in lines if line.startswith(f"{run}/{place}")]
        assert cause in line
        assert "[Errno" not in line
    # A file that is there needs no inode to grow.
    for place in ("metrics.jsonl", "tensorboard") if "inode" not in cause else ("tensorboard",):
        (line,) = [line for line in lines if line.startswith(f"{run}/{place}")]
        assert cause in line
    assert tracker.failures
    after = content(run)
    assert all(after[name].startswith(data) for name, data in before.items())
    assert newest_valid(run / "checkpoints") == run / "checkpoints" / "step-00000001"
    status = read_status(run)
    assert status is not None
    assert status.outcome == "running"


def test_a_cache_without_room_is_no_fault_of_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, fault: Any
) -> None:
    monkeypatch.setattr(reader, "_FIRST_BACKOFF_SECONDS", 0.01)
    save_index(numbered_index(tmp_path / "served", [30, 20]), tmp_path / "served")
    with range_server(tmp_path / "served") as server:
        index = load_index(server.url, str(tmp_path / "other"))
        config = DataConfig(path="unused", resolution=8, num_workers=0, cache_dir=str(disk.point))
        opened = reader.Reader(config, index, 0)
        opened.read_batch(np.array([0]))
        make_ill, cause = fault
        make_ill(disk)
        assert numbers_of(opened.read_batch(np.array([1])).data.numpy()) == [1]
        for said in (
            refusal(opened.read_batch, np.array([40])),
            refusal(load_index, server.url, str(disk.point)),
        ):
            assert cause in said
            assert f"{disk.point}" in said
            assert "data.cache_dir" in said or "another disk" in said
            assert "distgan index" not in said


def test_a_full_folder_for_temporary_files_is_not_a_damaged_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, fault: Any
) -> None:
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 600, 100, 100) + bytes(6_000_000)))
    monkeypatch.setattr(tempfile, "tempdir", str(disk.point))
    make_ill, cause = fault
    make_ill(disk)
    said = refusal(open_source, path)
    assert said.startswith(f"{path}: cannot unpack into {disk.point}: ")
    assert cause in said
    assert "TMPDIR" in said
    assert "download" not in said


def test_weights_that_do_not_fit_are_no_failed_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, fault: Any
) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "weights.pth").write_bytes(bytes(5_000_000))
    with range_server(tmp_path / "served") as server:
        published = PublishedFile(f"{server.url}/weights.pth", "")
        make_ill, cause = fault
        make_ill(disk)
        said = refusal(published.read, None, disk.point / "weights", in_config("inception"))
    assert said.startswith(f"{disk.point}/weights/weights.pth: cannot write the weights: ")
    assert cause in said
    assert content(disk.point) == {}


def test_a_disk_error_keeps_its_number_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    for number, cause in ((errno.EACCES, "Permission denied"), (errno.EDQUOT, "quota exceeded"), (errno.ENOSPC, "MB")):
        found = explained(OSError(number, os.strerror(number)), path)
        assert found.errno == number
        assert cause in str(found)
        assert "choose a folder" in str(found)
        assert explained(found, "/elsewhere") is found
    with pytest.raises(FileNotFoundError), disk_errors(path):
        path.read_bytes()
    with (
        pytest.raises(UserError, match=r"out: cannot write it: No such file or directory"),
        writing(path, "it", name="out"),
    ):
        path.write_bytes(b"")
