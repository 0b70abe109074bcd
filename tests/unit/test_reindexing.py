"""What `distgan index` checks before it reads shards, and what it keeps of the index that was there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from distgan.data.index import build
from distgan.data.index.checks import unlisted
from distgan.data.index.file import INDEX_NAME
from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.data.index.saving import save_index
from tests.servers import range_server
from tests.shards import build_index, refusal, write_numbered


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard may be read."""

    def read(*_: Any) -> None:
        pytest.fail("a shard was read before it was known whether its index can be written")

    monkeypatch.setattr(build, "_scan", read)


def test_an_index_of_more_shards_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbered(tmp_path, [2, 2, 2, 2])
    write_index(str(tmp_path))
    before = (tmp_path / INDEX_NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(build, "_scan", None)
        said = refusal(write_index, str(tmp_path / "00[01].tar"))
    assert f"{INDEX_NAME}: the earlier index lists 2 other shards" in said
    assert "002.tar; index all shards, or name another file with --out" in said
    assert (tmp_path / INDEX_NAME).read_bytes() == before
    part = tmp_path / "part.safetensors"
    assert write_index(str(tmp_path / "00[01].tar"), part).path == str(part)
    assert len(load_index(str(part))) == 4
    for name in ("002.tar", "003.tar"):
        (tmp_path / name).unlink()
    assert len(write_index(str(tmp_path)).index) == 4  # what is gone is not lost
    write_numbered(tmp_path, [2, 2, 2])
    assert len(write_index(str(tmp_path)).index) == 6


def test_a_damaged_index_is_replaced(tmp_path: Path) -> None:
    write_numbered(tmp_path, [2, 2])
    for content in (b"", b"x" * 100, bytes(1000)):
        (tmp_path / INDEX_NAME).write_bytes(content)
        write_index(str(tmp_path))
        assert len(load_index(str(tmp_path))) == 4


def test_class_names_are_kept_where_they_fit(tmp_path: Path) -> None:
    write_numbered(tmp_path, [4, 4], classes=2)
    assert write_index(str(tmp_path)).notes == ()
    save_index(build_index(str(tmp_path), class_names=["even", "odd"]), tmp_path)
    write_numbered(tmp_path, [4, 4, 4], classes=2)
    written = write_index(str(tmp_path))
    assert load_index(str(tmp_path)).class_names == written.index.class_names == ("even", "odd")
    assert "kept the names of 2 classes" in written.notes[0]
    write_numbered(tmp_path, [4, 4, 4], classes=3)
    written = write_index(str(tmp_path))
    assert load_index(str(tmp_path)).class_names is None
    assert "dropped the names of 2 classes in the earlier index: the shards now have 3" in written.notes[0]


def test_class_names_of_other_shards_are_not_taken(tmp_path: Path) -> None:
    write_numbered(tmp_path, [4], classes=2)
    save_index(build_index(str(tmp_path), class_names=["even", "odd"]), tmp_path)
    os.rename(tmp_path / "000.tar", tmp_path / "other.tar")
    assert write_index(str(tmp_path)).index.class_names is None


@pytest.mark.usefixtures("unread")
def test_a_place_that_cannot_be_written_is_told_before_reading(tmp_path: Path) -> None:
    write_numbered(tmp_path / "shards", [2])
    for place in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "x.safetensors"):
        said = refusal(write_index, str(tmp_path / "shards"), place)
        assert "000.tar is outside this folder" in said
        assert "symlinks to the shards" in said
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "shards" / "x.safetensors").mkdir()
    said = refusal(write_index, str(tmp_path / "shards"), tmp_path / "shards" / "x.safetensors")
    assert "x.safetensors: cannot write the index: Is a directory" in said
    with range_server(tmp_path / "shards") as server:
        assert "with --out" in refusal(write_index, f"{server.url}/000.tar")
        said = refusal(write_index, f"{server.url}/000.tar", "/proc/nothing")
        assert "/proc/nothing/index.safetensors: cannot write the index" in said
    assert "name a folder with --out" in refusal(write_index, str(tmp_path / "shards"), "")


def test_a_folder_of_symlinks_is_the_way_out(tmp_path: Path) -> None:
    write_numbered(tmp_path / "shards", [2, 3])
    links = tmp_path / "links"
    links.mkdir()
    for shard in (tmp_path / "shards").iterdir():
        (links / shard.name).symlink_to(shard)
    write_index(str(links))
    assert len(load_index(str(links))) == 5


def test_tars_that_the_index_does_not_list(tmp_path: Path) -> None:
    write_numbered(tmp_path, [2, 2])
    write_index(str(tmp_path))
    write_numbered(tmp_path, [2, 2, 2, 2])
    index = load_index(str(tmp_path))
    (said,) = unlisted([str(tmp_path), str(tmp_path / "000.tar"), str(tmp_path / INDEX_NAME)], index)
    assert said.startswith(f"{tmp_path}: the index does not list 2 tars in this folder, such as '002.tar'")
    assert unlisted(str(tmp_path / "*.tar"), index) == ()
    write_index(str(tmp_path))
    assert unlisted(str(tmp_path), load_index(str(tmp_path))) == ()
