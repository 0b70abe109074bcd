"""The index against Python's own tarfile, and what it says of tars and index files that are wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgan.data.index import INDEX_NAME, Index, build_index, load_index, save_index
from distgan.data.indexing import split_name
from distgan.data.tar import BLOCK, WindowReader, walk
from distgan.errors import UserError
from tests.shards import numbered_index, numbered_png, write_numbered, write_tar

PNG = numbered_png(1)


def refusal(action: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def entries(index: Index) -> list[tuple[int, int, int, int, str]]:
    return [index.entry(sample) for sample in range(len(index))]


class Digest:
    def __init__(self) -> None:
        self.data = b""

    def update(self, data: bytes, /) -> None:
        self.data += data


names = st.lists(
    st.text(
        st.characters(codec="utf-8", exclude_characters="/\0\n.", exclude_categories=["Cs"]), min_size=1, max_size=60
    ),
    min_size=1,
    max_size=4,
).map("/".join)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(names, st.integers(0, 3000)), min_size=1, max_size=8),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_walk_finds_what_tarfile_finds(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int]], format: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    try:
        write_tar(path, [(name, bytes(size)) for name, size in members], format)
    except ValueError:  # ustar cannot hold such a name
        return
    with WindowReader(str(path)) as reader:
        walked = list(walk(reader, "a.tar", Digest()))
    with tarfile.open(path) as tar:
        expected = [(info.name.encode(), info.offset_data, info.size) for info in tar]
    data = path.read_bytes()
    assert [(name, offset, size) for name, offset, size, _ in walked] == expected
    assert [member.crc for member in walked] == [zlib.crc32(data[o - BLOCK : o]) for _, o, _ in expected]


def test_large_numbers_as_gnu_and_pax_write_them(tmp_path: Path) -> None:
    huge = 3 * 2**33  # does not fit eleven octal digits
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        with path.open("wb") as file:
            info = tarfile.TarInfo("a.png")
            info.size = huge
            file.write(info.tobuf(format))
            data = file.tell()
            file.truncate(data + huge)
            file.seek(data + huge)
            second = tarfile.TarInfo("b.png")
            file.write(second.tobuf(format) + bytes(1024))
        with WindowReader(str(path)) as reader:
            found = list(walk(reader, "huge", Digest()))
        assert [(member.name, member.offset, member.size) for member in found] == [
            (b"a.png", data, huge),
            (b"b.png", data + huge + BLOCK, 0),
        ]


def test_little_is_read_between_large_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(1 << 20)) for i in range(20)])
    fetched = []
    fetch = WindowReader._fetch
    monkeypatch.setattr(WindowReader, "_fetch", lambda self, a, b: fetched.append(b - a) or fetch(self, a, b))
    build_index(str(path))
    assert sum(fetched) < 200_000
    assert len(fetched) <= 22


def test_samples_keys_labels_and_other_members(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "dir/x.y/0.JPG": b"jpg",
            "dir/x.y/0.cls": b"7\n",
            "dir/x.y/0.json": b"{}",
            "1.txt": b"a caption",
            "1.cls": b" 2",
            "1.png": b"png",
            "._1.png": b"left by a file manager",
            "2.pyd": b"code",
            "2.pickle": b"code",
            "2.cls": b"0",
            "__meta__/x__": b"",
            "3.left.webp": b"an extension of its own",
        },
    )
    index = build_index(str(tmp_path))
    assert [index.key(i) for i in range(2)] == ["dir/x.y/0", "1"]
    assert index.labels.tolist() == [7, 2]
    assert [entry[4] for entry in entries(index)] == ["jpg", "png"]
    assert index.num_classes == 8
    data = (tmp_path / "a.tar").read_bytes()
    assert [data[offset : offset + size] for _, offset, size, _, _ in entries(index)] == [b"jpg", b"png"]
    assert index.name(1) == "a.tar:1"


@settings(deadline=None)
@given(names.flatmap(lambda name: st.tuples(st.just(name), st.sampled_from([".png", ".cls", ".tar.gz", "", "."]))))
def test_keys_are_webdatasets(parts: tuple[str, str]) -> None:
    from webdataset.tariterators import base_plus_ext

    name = "".join(parts)
    key, extension = split_name(name.encode())
    expected_key, expected_extension = base_plus_ext(name)
    if name.startswith("__") and name.endswith("__"):
        return
    assert (key.decode() or None) == expected_key
    assert extension == (expected_extension or "").lower()


def test_fingerprint_follows_the_data_not_the_place(tmp_path: Path) -> None:
    first = numbered_index(tmp_path / "a", [3, 2], classes=2)
    assert numbered_index(tmp_path / "b" / "c", [3, 2], classes=2).fingerprint == first.fingerprint
    assert numbered_index(tmp_path / "d", [2, 3], classes=2).fingerprint != first.fingerprint
    assert numbered_index(tmp_path / "e", [3, 2], classes=3).fingerprint != first.fingerprint
    os.rename(tmp_path / "a" / "000.tar", tmp_path / "a" / "zzz.tar")
    assert build_index(str(tmp_path / "a")).fingerprint != first.fingerprint


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("0.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("1.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    index = build_index(str(tmp_path))
    assert [index.key(i) for i in range(len(index))] == ["1"]


def test_names_in_messages_are_printable(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"\x1b[2J\tä.png": PNG})
    index = build_index(str(tmp_path))
    assert index.key(0) == "\x1b[2J\tä"
    assert index.name(0) == "a.tar:?[2J?ä"


def test_wrong_tars(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def said_of(members: Any, format: int = tarfile.USTAR_FORMAT) -> str:
        return refusal(build_index, str(write_tar(path, members, format)))

    assert "no image" in said_of({"a.txt": b"x"})
    assert "two images for the key 'a'" in said_of({"a.png": PNG, "a.jpg": PNG})
    assert "two labels" in said_of([("a.png", PNG), ("a.cls", b"1"), ("a.cls", b"1")])
    assert "'b' has no .cls label" in said_of({"a.png": PNG, "a.cls": b"1", "b.png": PNG})
    for label in (b"-1", b"one", b"", b"1.5", b"9" * 20, b"1000000", "٣".encode()):
        assert "'a.cls' holds" in said_of({"a.png": PNG, "a.cls": label})
    for name in ("/etc/a.png", "../a.png", "b/../../a.png"):
        assert "outside the tar" in said_of({name: PNG}, tarfile.PAX_FORMAT)
    assert "line break" in said_of({"a\nb.png": PNG})
    path.write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "compressed" in refusal(build_index, str(path))
    path.write_bytes(b"nothing of the kind" * 100)
    assert "not a tar" in refusal(build_index, str(path))
    path.write_bytes(b"")
    assert "truncated" in refusal(build_index, str(path))


def test_labels_must_be_everywhere_or_nowhere(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a", [2], classes=2)
    write_numbered(tmp_path / "b", [2])
    said = refusal(build_index, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert "b/000.tar: has no .cls labels" in said
    assert "class names" in refusal(lambda: build_index(str(tmp_path / "a"), class_names=["only one"]))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_noticed(tmp_path: Path, format: int) -> None:
    long = "folder/" * 20 + "x"
    whole = write_tar(tmp_path / "a.tar", {"a.png": PNG, f"{long}.png": PNG[:20]}, format)
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        end = max(info.offset_data + -(-info.size // BLOCK) * BLOCK for info in tar)
    for cut in [*range(0, end, 97), end - 1, end]:
        whole.write_bytes(data[:cut])
        said = refusal(build_index, str(whole))
        assert "truncated" in said, (cut, said)
        assert "a.tar" in said
    whole.write_bytes(data[: end + 2 * BLOCK])
    assert len(build_index(str(whole))) == 2


def test_damaged_headers_are_noticed_and_never_crash(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", {"a" * 120 + ".png": PNG, "b.png": PNG}, tarfile.PAX_FORMAT)
    data = whole.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        place = int(random.integers(0, 2048))
        broken[place] ^= int(random.integers(1, 256))
        whole.write_bytes(broken)
        with contextlib.suppress(UserError):
            build_index(str(whole))
    header = bytearray(data)
    header[BLOCK + 2] ^= 1  # a digit of the PAX record's length
    whole.write_bytes(header)
    assert "PAX" in refusal(build_index, str(whole))


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def test_sizes_that_lie(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": PNG, "b.png": PNG})
    data = path.read_bytes()
    for field in (b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"\xff" * 12):
        header = bytearray(data[:BLOCK])
        header[124:136] = field
        path.write_bytes(with_checksum(header) + data[BLOCK:])
        assert "truncated" in (said := refusal(build_index, str(path))) or "size" in said
    header = bytearray(data[:BLOCK])
    header[156:157], header[124:136] = b"x", b"00100000000\0"
    path.write_bytes(with_checksum(header) + data[BLOCK:])
    assert "extended header" in refusal(build_index, str(path))


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
    assert len(pickle.dumps(loaded)) < 500
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
    assert "nor any tar" in refusal(load_index, str(tmp_path))
    assert "no tar found" in refusal(load_index, str(tmp_path / "nowhere"))
    write_numbered(tmp_path, [2, 2])
    for path in (tmp_path, tmp_path / INDEX_NAME, tmp_path / "*.tar"):
        assert "there are 2 tars; build the index of the shards with `distgan index`" in refusal(load_index, str(path))
    assert "distgan index" in refusal(load_index, str(tmp_path / "*.tar"))
    save_index(build_index(str(tmp_path)), tmp_path)
    with (tmp_path / "001.tar").open("ab") as file:
        file.write(bytes(BLOCK))
    assert "it changed after indexing" in refusal(load_index, str(tmp_path))
    (tmp_path / "001.tar").unlink()
    assert "001.tar: listed in" in refusal(load_index, str(tmp_path))
    assert "empty list" in refusal(load_index, [])
    assert "not in this folder" in refusal(save_index, build_index(str(tmp_path / "000.tar")), tmp_path / "elsewhere")
    (tmp_path / "x.safetensors").mkdir()
    assert "cannot write the index" in refusal(
        save_index, build_index(str(tmp_path / "000.tar")), f"{tmp_path}/x.safetensors"
    )
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_what_is_never_followed(tmp_path: Path) -> None:
    for path in ("pipe:cat a.tar", " PIPE:id", "simplecache::s3://b/a.tar", "ssh://host/a.tar", "reference://x"):
        assert "never followed" in (said := refusal(load_index, path)) or "not read" in said
        refusal(build_index, path)
        refusal(build_index, [path])
    assert "secret" not in refusal(load_index, "ftp://user:secret@host/a.tar?token=secret")
    assert "1,000,000" in refusal(build_index, str(tmp_path / "{0..99}{0..99}{0..999}.tar"))


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
        set_shard(1, -1),
        set_shard(1, 10),
        set_shard(1, 2**70),
        set_shard(2, 0),
        set_shard(2, 2),
        set_shard(2, 4),
        set_shard(2, 2**62),
        set_shard(2, "3"),
        set_header("labels", "dtype", "F32"),
        set_header("labels", "shape", [3, 2]),
        set_header("labels", "shape", [2**60]),
        set_header("labels", "data_offsets", [0, 10**9]),
        set_header("labels", "data_offsets", [-8, 12]),
        set_header("labels", "data_offsets", "none"),
        lambda header, table, body: table.update(version=2),
        lambda header, table, body: table.update(more=1),
        lambda header, table, body: table.update(shards=[]),
        lambda header, table, body: table.update(class_names=["one"]),
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
    for name in ("../000.tar", "./000.tar", "a/../000.tar", str(tmp_path / "000.tar")):
        rewrite(tmp_path / "sub" / INDEX_NAME, set_shard(0, name))
        assert "is not a plain path inside its folder" in refusal(load_index, str(tmp_path / "sub"))


def test_an_index_file_that_is_none(tmp_path: Path) -> None:
    numbered_index(tmp_path, [3])
    path = tmp_path / INDEX_NAME
    data = path.read_bytes()
    for content in (b"", b"x", data[:100], data[:-1], bytes(1000), b"\xff" * 1000, pickle.dumps({"a": 1})):
        path.write_bytes(content)
        assert "index" in refusal(load_index, str(tmp_path))
