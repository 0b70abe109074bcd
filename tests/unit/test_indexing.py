"""Walking tars and indexing them, against Python's own tarfile and webdataset, and what is said of wrong ones."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgan.data.index.members import split_name
from distgan.data.storage.tar import BLOCK, WindowReader, walk
from distgan.errors import UserError
from tests.shards import build_index, entries, numbered_png, refusal, write_numbered, write_tar

PNG = numbered_png(1)


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
        starts = [info.offset for info in tar]
    data = path.read_bytes()
    assert [(name, offset, size) for name, offset, size, *_ in walked] == expected
    assert [member.start for member in walked] == starts
    assert [member.end for member in walked][:-1] == starts[1:]
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
    assert len(fetched) <= 23  # one for each header, and one for what follows the end mark


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


@pytest.mark.parametrize("name", [b"\xff.tar", b"\x1b[2J.tar"])
def test_a_shard_whose_name_cannot_be_printed(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    os.rename(write_tar(tmp_path / "a.tar", {"a.png": PNG}), path)
    for shards in (str(tmp_path), os.fsdecode(path)):
        message = refusal(build_index, shards)
        assert "not printable" in message
        assert message.isprintable()


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "not a regular file" in refusal(build_index, str(tmp_path / "a.tar"))


def test_wrong_tars(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def said_of(members: Any, format: int = tarfile.USTAR_FORMAT) -> str:
        return refusal(build_index, str(write_tar(path, members, format)))

    assert "no sample" in said_of({"a.json": b"x"})
    assert "two images for the key 'a'" in said_of({"a.png": PNG, "a.jpg": PNG})
    assert "two labels" in said_of([("a.png", PNG), ("a.cls", b"1"), ("a.cls", b"1")])
    assert "'b' has no .cls label" in said_of({"a.png": PNG, "a.cls": b"1", "b.png": PNG})
    for label in (b"-1", b"one", b"", b"1.5", b"9" * 20, b"1000000", "٣".encode()):
        assert "'a.cls'" in said_of({"a.png": PNG, "a.cls": label})
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
    assert "b/000.tar: found no .cls labels" in said
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
