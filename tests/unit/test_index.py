"""The index as a file: what is kept, what is refused, and which shards of it are read."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from distgan.data.index.file import INDEX_NAME
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.data.storage.tar import BLOCK
from tests.shards import build_index, entries, numbered_index, refusal, write_numbered


def test_fingerprint_follows_the_data_not_the_place(tmp_path: Path) -> None:
    first = numbered_index(tmp_path / "a", [3, 2], classes=2)
    assert numbered_index(tmp_path / "b" / "c", [3, 2], classes=2).fingerprint == first.fingerprint
    assert numbered_index(tmp_path / "d", [2, 3], classes=2).fingerprint != first.fingerprint
    assert numbered_index(tmp_path / "e", [3, 2], classes=3).fingerprint != first.fingerprint
    os.rename(tmp_path / "a" / "000.tar", tmp_path / "a" / "zzz.tar")
    assert build_index(str(tmp_path / "a")).fingerprint != first.fingerprint


def test_saved_and_loaded(tmp_path: Path) -> None:
    write_numbered(tmp_path, [3, 1, 4], classes=2)
    built = build_index(str(tmp_path), verify=True, class_names=["even", "odd"])
    assert save_index(built, tmp_path) == str(tmp_path / INDEX_NAME)
    for path in (tmp_path, tmp_path / INDEX_NAME, tmp_path / "*.tar", tmp_path / "{000..002}.tar"):
        loaded = load_index(str(path))
        for index in (loaded, pickle.loads(pickle.dumps(loaded)), pickle.loads(pickle.dumps(built))):  # noqa: S301
            assert index.shards == built.shards
            assert index.fingerprint == built.fingerprint
            assert index.class_names == ("even", "odd")
            assert index.num_classes == 2
            assert entries(index) == entries(built)
            assert index.labels.tolist() == built.labels.tolist()
            assert [index.key(i) for i in range(8)] == [built.key(i) for i in range(8)]
    assert len(pickle.dumps(loaded)) < 600
    assert (
        os.listdir(tmp_path).count(INDEX_NAME) == len([n for n in os.listdir(tmp_path) if not n.endswith(".tar")]) == 1
    )
    os.rename(tmp_path, tmp_path.with_name("moved"))
    moved = load_index(str(tmp_path.with_name("moved")))
    assert moved.shards[0].url == str(tmp_path.with_name("moved") / "000.tar")
    assert moved.fingerprint == built.fingerprint


def test_some_shards_of_an_index_and_several_indexes(tmp_path: Path) -> None:
    whole = numbered_index(tmp_path / "a", [3, 1, 4, 2], classes=2)
    other = numbered_index(tmp_path / "b", [5], classes=2)
    some = load_index([str(tmp_path / "a" / "002.tar"), str(tmp_path / "b"), str(tmp_path / "a" / "{000..001}.tar")])
    assert [shard.count for shard in some.shards] == [4, 5, 3, 1]
    expected = [*range(4, 8), *range(5), *range(0, 4)]
    sources = [whole] * 4 + [other] * 5 + [whole] * 4
    for sample, (source, original) in enumerate(zip(sources, expected, strict=True)):
        assert some.entry(sample)[1:] == source.entry(original)[1:]
        assert some.key(sample) == source.key(original)
        assert some.labels[sample] == source.labels[original]
    assert pickle.loads(pickle.dumps(some)).fingerprint == some.fingerprint  # noqa: S301
    assert "twice" in refusal(load_index, [str(tmp_path / "a"), str(tmp_path / "a" / "001.tar")])
    write_numbered(tmp_path / "a", [3, 1, 4, 2, 1], classes=2)
    assert "distgan index" in refusal(load_index, str(tmp_path / "a" / "004.tar"))
    numbered_index(tmp_path / "c", [2])
    assert "labels or class names differ" in refusal(load_index, [str(tmp_path / "a"), str(tmp_path / "c")])


def test_what_is_missing_or_changed(tmp_path: Path) -> None:
    assert "no tar" in refusal(load_index, str(tmp_path))
    assert "found no tar" in refusal(load_index, str(tmp_path / "nowhere"))
    write_numbered(tmp_path, [2, 2])
    for path in (tmp_path, tmp_path / INDEX_NAME, tmp_path / "*.tar"):
        assert "found 2 tars in its folder; build the index of the shards with `distgan index`" in refusal(
            load_index, str(path)
        )
    assert "distgan index" in refusal(load_index, str(tmp_path / "*.tar"))
    save_index(build_index(str(tmp_path)), tmp_path)
    with (tmp_path / "001.tar").open("ab") as file:
        file.write(bytes(BLOCK))
    assert "the shard changed after indexing" in refusal(load_index, str(tmp_path))
    (tmp_path / "001.tar").unlink()
    assert "001.tar: listed in" in refusal(load_index, str(tmp_path))
    assert "the list is empty" in refusal(load_index, [])
    assert "outside this folder" in refusal(save_index, build_index(str(tmp_path / "000.tar")), tmp_path / "elsewhere")
    (tmp_path / "x.safetensors").mkdir()
    assert "cannot write the index" in refusal(
        save_index, build_index(str(tmp_path / "000.tar")), f"{tmp_path}/x.safetensors"
    )
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_what_is_never_followed(tmp_path: Path) -> None:
    for path in ("pipe:cat a.tar", " PIPE:id", "simplecache::s3://b/a.tar", "ssh://host/a.tar", "reference://x"):
        assert "shell command" in (said := refusal(load_index, path)) or "unsupported kind of URL" in said
        refusal(build_index, path)
        refusal(build_index, [path])
    for empty in ("", " ", ["", str(tmp_path)]):
        assert "is empty" in refusal(load_index, empty)
        assert "is empty" in refusal(build_index, empty)
    assert "secret" not in refusal(load_index, "ftp://user:secret@host/a.tar?token=secret")
    for many in ("{0..99}{0..99}{0..999}", "{0..9999999999}", "{-1..1000000..-1}", "{a,{1..9999999999..2}}"):
        assert "1,000,000" in refusal(build_index, str(tmp_path / f"{many}.tar"))


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to the header and the table of an index file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    table = json.loads(header["__metadata__"]["distgan_index"])
    body = bytearray(data[8 + length :])
    change(header, table, body)
    if "__metadata__" in header:
        header["__metadata__"]["distgan_index"] = json.dumps(table)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def set_value(name: str, place: int, value: int) -> Any:
    formats = {"I64": ("<q", 8), "I32": ("<i", 4), "U32": ("<I", 4), "U8": ("<B", 1)}

    def change(header: Any, table: Any, body: bytearray) -> None:
        code, width = formats[header[name]["dtype"]]
        struct.pack_into(code, body, header[name]["data_offsets"][0] + place * width, value)

    return change


def set_shard(column: int, value: Any) -> Any:
    return lambda header, table, body: table["shards"][0].__setitem__(column, value)


def set_header(name: str, field: str, value: Any) -> Any:
    return lambda header, table, body: header[name].__setitem__(field, value)


@pytest.mark.parametrize(
    "change",
    [
        set_value("offsets", 0, 0),
        set_value("offsets", 0, -512),
        set_value("offsets", 0, 513),
        set_value("offsets", 1, 512),
        set_value("offsets", 2, 2**62),
        set_value("sizes", 2, 2**62),
        set_value("sizes", 0, -1),
        set_value("span_starts", 0, -512),
        set_value("span_starts", 0, 513),
        set_value("span_starts", 4, 2**62),
        set_value("span_sizes", 0, 0),
        set_value("span_sizes", 2, 2**62),
        set_value("labels", 0, -2),
        set_value("labels", 0, -1),
        set_value("labels", 0, 2**31 - 1),
        set_value("extensions", 0, 200),
        set_value("key_ends", 0, -1),
        set_value("key_ends", 0, 2**40),
        set_value("key_ends", 4, 1),
        set_shard(0, "../000.tar"),
        set_shard(0, "/etc/passwd"),
        set_shard(0, "a/../../000.tar"),
        set_shard(0, "pipe:cat 000.tar"),
        set_shard(0, "ssh://host/000.tar"),
        set_shard(0, ""),
        set_shard(0, "\x1b[2J.tar"),
        set_shard(0, "http://host/\x1b[2J.tar"),
        set_shard(0, "http://host/%1b[2J.tar"),
        set_shard(1, -1),
        set_shard(1, 10),
        set_shard(1, 2**70),
        set_shard(2, 0),
        set_shard(2, 2),
        set_shard(2, 4),
        set_shard(2, 2**62),
        set_shard(2, 10**30),
        set_shard(2, "3"),
        set_header("labels", "dtype", "F32"),
        set_header("labels", "shape", [3, 2]),
        set_header("labels", "shape", [2**60]),
        set_header("labels", "data_offsets", [0, 10**9]),
        set_header("labels", "data_offsets", [-8, 12]),
        set_header("labels", "data_offsets", "none"),
        lambda header, table, body: table.update(version=1),
        lambda header, table, body: table.update(more=1),
        lambda header, table, body: table.update(shards=[]),
        lambda header, table, body: table.update(class_names=["one"]),
        lambda header, table, body: table.update(vocabulary=["\ufffd", "`"]),
        set_value("extensions", 0, 5),
        lambda header, table, body: header.pop("sizes"),
        lambda header, table, body: header.pop("__metadata__"),
        lambda header, table, body: body.clear(),
    ],
)
def test_a_strangers_index_is_refused(tmp_path: Path, change: Any) -> None:
    numbered_index(tmp_path, [3, 2], classes=2)
    rewrite(tmp_path / INDEX_NAME, lambda header, table, body: None)
    load_index(str(tmp_path))
    rewrite(tmp_path / INDEX_NAME, change)
    assert "index" in refusal(load_index, str(tmp_path))


def test_a_shard_outside_the_folder_is_refused_even_if_it_fits(tmp_path: Path) -> None:
    numbered_index(tmp_path, [3, 2])
    numbered_index(tmp_path / "sub", [3, 2])
    for name in (
        "../000.tar",
        "./000.tar",
        "a/../000.tar",
        str(tmp_path / "000.tar"),
        f"file://{tmp_path}/000.tar",
        f"FILE://{tmp_path}/000.tar",
    ):
        rewrite(tmp_path / "sub" / INDEX_NAME, set_shard(0, name))
        assert "invalid shard name" in refusal(load_index, str(tmp_path / "sub"))


def test_a_shard_listed_twice_is_refused_even_if_it_fits(tmp_path: Path) -> None:
    numbered_index(tmp_path, [3, 3])
    rewrite(tmp_path / INDEX_NAME, set_shard(0, "001.tar"))
    assert "lists a shard twice" in refusal(load_index, str(tmp_path))


def test_an_index_file_that_is_none(tmp_path: Path) -> None:
    numbered_index(tmp_path, [3])
    path = tmp_path / INDEX_NAME
    data = path.read_bytes()
    for content in (b"", b"x", data[:100], data[:-1], bytes(1000), b"\xff" * 1000, pickle.dumps({"a": 1})):
        path.write_bytes(content)
        assert "index" in refusal(load_index, str(tmp_path))
