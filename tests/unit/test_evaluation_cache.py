"""The cache of evaluation: what is damaged is made again, what cannot be written is no error."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from distgan.evaluation import statistics_cache


def entry_of(value: float) -> statistics_cache.Entry:
    return statistics_cache.Entry(
        {"numbers": torch.full((1000,), value).double(), "label": torch.tensor([3])}, {"samples": 7}
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.safetensors"
    assert statistics_cache.read(path) is None
    statistics_cache.write(path, entry_of(2.0))
    found = statistics_cache.read(path)
    assert found is not None
    assert found.facts == {"samples": 7}
    assert torch.equal(found.tensors["numbers"], entry_of(2.0).tensors["numbers"])
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_damaged_file_is_a_warning(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.safetensors"
    statistics_cache.write(path, entry_of(2.0))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    damaged = {"truncated": content[:-9], "flipped": content, "empty": b"", "other": b"{}" * 40}
    path.write_bytes(damaged[damage])
    assert statistics_cache.read(path) is None
    assert str(path) in caplog.text
    statistics_cache.write(path, entry_of(3.0))
    found = statistics_cache.read(path)
    assert found is not None
    assert found.tensors["numbers"][0] == 3


def test_folder_that_cannot_be_written_to_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    statistics_cache.write(tmp_path / "file" / "inside", entry_of(1.0))
    assert "evaluation.cache_dir" in caplog.text
    assert len(caplog.records) == 1


def test_many_writers_leave_one_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.safetensors"
    caplog.set_level(logging.WARNING)
    statistics_cache.write(path, entry_of(0.0))
    writers = [
        threading.Thread(target=lambda i=i: [statistics_cache.write(path, entry_of(i)) for _ in range(20)])
        for i in range(4)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert statistics_cache.read(path) is not None
    assert not caplog.records
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


def test_digest_sees_names_shapes_and_values() -> None:
    tensors = [{"a": torch.zeros(4)}, {"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.ones(4)}]
    assert len({statistics_cache.digest(t) for t in tensors}) == 4
    assert statistics_cache.digest({"a": torch.zeros(4), "b": torch.ones(1)}) == statistics_cache.digest(
        {"b": torch.ones(1), "a": torch.zeros(4)}
    )
