"""Bytes of shards: those of webdataset's own writer, whole samples, and what other tools read."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st

from distgan.data.packing.pack import pack
from distgan.data.packing.sources.arrays import encode_point
from distgan.data.packing.tar_writer import ShardSize, ShardWriter, ustar_header
from tests.sources import members, numbered_images, png


@pytest.mark.parametrize("limit", [20_480, 30_719])
def test_members_of_any_size_fill_shards_to_the_byte(tmp_path: Path, limit: int) -> None:
    contents = [bytes([1]) * size for size in (0, 1, 511, 512, 513, 1024, 24 * 512, 36 * 512, 513, 512)]
    with ShardWriter(tmp_path, ShardSize(size=limit)) as writer:
        for number, content in enumerate(contents):
            writer.add(str(number), {"jpg": content})
    assert [data for _, data in members(tmp_path)] == contents
    # With headers 1 + 2 + 2 + 2 + 3 + 3 + 25 blocks and two for the end fill 40; then 37; then 3 and 2.
    assert [path.stat().st_size for path in writer.paths] == [20_480, 20_480, 10_240]
    assert writer.size == 20_480 + 20_480 + 10_240


# Longer names and others than ASCII, which pack never writes, would need a PAX header.
KEYS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=79)
MEMBERS = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._]{0,19}", fullmatch=True),
    st.one_of(st.binary(max_size=1100), st.integers(0, 25_000).map(bytes)),
    min_size=1,
    max_size=4,
)
PLAIN: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}


@given(samples=st.lists(st.tuples(KEYS, MEMBERS), min_size=1, max_size=6), each=st.integers(1, 6))
@example(samples=[("0", {"a": bytes(8192)})], each=1)  # header, data and end fill 10,240 bytes
@example(samples=[("k" * 94, {"png": b"1", "cls": b"0", "a.png": b"", "Z": b"2"})], each=1)  # a name of 100 characters
def test_bytes_are_those_of_webdataset(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, dict[str, bytes]]], each: int
) -> None:
    folder, theirs = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("webdataset")
    with ShardWriter(folder, ShardSize(samples=each)) as writer:
        for key, of_key in samples:
            writer.add(key, of_key)
    with webdataset.ShardWriter(str(theirs / "shard-%06d.tar"), maxcount=each, verbose=0, **PLAIN) as reference:
        for key, of_key in samples:
            reference.write({"__key__": key, **of_key})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in theirs.iterdir()
    }
    assert writer.size == sum(path.stat().st_size for path in folder.iterdir())


def packed_sources(folder: Path) -> dict[str, list[dict[str, bytes]]]:
    """Pack images, text and points into folders of that name; return the members of each sample by its number."""
    pack(numbered_images(folder / "in", 50), folder / "images", shard_size=20, workers=1)
    (folder / "in.txt").write_text("".join(f"line {i} ü\n" for i in range(50)))
    pack(folder / "in.txt", folder / "text", shard_size="20KB", workers=1)
    points = np.arange(100, dtype=np.float32).reshape(50, 2)
    np.save(folder / "in.npy", points)
    pack(folder / "in.npy", folder / "points", shard_size=20, workers=1)
    return {
        "images": [{"png": png(i), "cls": b"%d" % (i >= 25)} for i in range(50)],
        "text": [{"txt": f"line {i} ü".encode()} for i in range(50)],
        "points": [{"npy": encode_point(point).data} for point in points],
    }


def test_webdataset_reads_what_pack_writes_and_writes_the_same_bytes(tmp_path: Path) -> None:
    for kind, expected in packed_sources(tmp_path).items():
        paths = sorted((tmp_path / kind).glob("*.tar"))
        assert len(paths) > 1
        numbers = []
        for path in paths:
            copy = tmp_path / "copy.tar"
            with webdataset.TarWriter(str(copy), **PLAIN) as writer:
                for sample in webdataset.WebDataset(str(path), shardshuffle=False):
                    number = int(sample["__key__"])
                    assert sample["__key__"] == f"{number:08d}"
                    assert {key: sample[key] for key in sample if not key.startswith("__")} == expected[number]
                    writer.write({"__key__": sample["__key__"], **expected[number]})
                    numbers.append(number)
            assert path.read_bytes() == copy.read_bytes(), path
        assert sorted(numbers) == list(range(50))
        assert numbers != sorted(numbers)


@given(name=st.from_regex(r"[a-z0-9][a-z0-9./_-]{0,98}[a-z]", fullmatch=True), size=st.integers(0, 8**11 - 1))
def test_headers_are_those_of_the_standard_library(name: str, size: int) -> None:
    info = tarfile.TarInfo.frombuf(ustar_header(name, size), "ascii", "strict")
    assert (info.name, info.size, info.mtime, info.uid, info.gid, info.mode) == (name, size, 0, 0, 0, 0o644)
    assert info.type == (tarfile.REGTYPE)
    assert (info.uname, info.gname, info.linkname) == ("", "", "")


def test_other_tools_read_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    pack(numbered_images(tmp_path / "images", 50), tmp_path / "out", shard_size=20, workers=1)
    shards = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None)
        .decode("l8")
        .to_tuple("__key__", "png", "cls")
    )
    samples = list(dataset)
    assert sorted(key for key, _, _ in samples) == [f"{i:08d}" for i in range(50)]
    assert all((image == int(key)).all() and label == (int(key) >= 25) for key, image, label in samples)
    as_pictures = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).decode("pil")
    pictures = {sample["__key__"]: (sample["png"], sample["cls"]) for sample in as_pictures}
    assert sorted(pictures) == sorted(key for key, _, _ in samples)
    for key, (picture, label) in pictures.items():
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (4, 4), (int(key),) * 3)
        assert label == (int(key) >= 25)
    if shutil.which("tar"):
        listing = subprocess.run(["tar", "tf", tmp_path / "out" / "shard-000002.tar"], capture_output=True, text=True)
        assert (listing.returncode, listing.stderr, len(listing.stdout.split())) == (0, "", 20)
