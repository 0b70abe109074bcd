"""What an index says of members, tars and folders that it does not take up."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from distgan.data.index.build import index_shards
from distgan.data.index.checks import unlisted
from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.errors import UserError
from tests.shards import build_index, held, numbered_png, refusal, write_tar


def test_what_is_passed_over_is_counted_with_an_example(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("0.png", "0.txt", "1.png", "1.txt", "README", ".hidden", "lost.cls", "Track 2.0.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"3"))
        for name, kind, target in (
            ("2.png", tarfile.SYMTYPE, "0.png"), ("3.png", tarfile.LNKTYPE, "absent.png"),
            ("4.png", tarfile.FIFOTYPE, ""), ("5.png", tarfile.LNKTYPE, "1.png"), ("folder", tarfile.DIRTYPE, ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    built = index_shards(str(path))
    assert sorted(held(built.index)) == ["0", "1", "5"]
    counted, hint = built.notes
    assert "9 members" in counted
    assert "2 .txt (such as '0.txt')" in counted
    assert counted.count("(such as") == 6  # of 8 sorts
    assert "2 other sorts" in counted
    assert "--last-dot" in hint
    assert sorted(held(index_shards(str(path), last_dot=True).index)) == ["0", "1", "5", "Track 2.0"]


def test_the_last_dot_is_not_offered_for_masks_of_samples(tmp_path: Path) -> None:
    """It would make each of them a sample."""
    image = numbered_png(1)
    path = write_tar(tmp_path / "a.tar", {f"{n}{end}.png": image for n in "ab" for end in ("", ".mask")})
    [note] = index_shards(str(path)).notes
    assert "2 .mask.png beside samples" in note


def test_the_last_dot_is_not_offered_to_who_asked_for_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": b"1", "1.0.txt": b"a caption"})
    built = index_shards(str(path), last_dot=True)
    assert held(built.index) == {"1": b"1"}
    (counted,) = built.notes
    assert "1 .txt (such as '1.0.txt')" in counted


@pytest.mark.parametrize(
    ("name", "kind", "sort"),
    [
        ("README", tarfile.REGTYPE, "without an extension"),
        ("folder/._1.png", tarfile.REGTYPE, "hidden"),
        ("lost.cls", tarfile.REGTYPE, ".cls"),
        ("Track 2.0.png", tarfile.REGTYPE, ".0.png"),
        ("2.png", tarfile.SYMTYPE, "symbolic link"),
        ("3.png", tarfile.LNKTYPE, "hard link"),
        ("4.png", tarfile.FIFOTYPE, "pipe"),
        ("5.png", b"Z", "b'Z'"),
    ],
)
def test_each_sort_that_is_passed_over_is_named_with_its_example(
    tmp_path: Path, name: str, kind: bytes, sort: str
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member, of_kind, target in (("1.png", tarfile.REGTYPE, ""), (name, kind, "absent")):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = of_kind, target
            info.size = 1 if of_kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"3"))
    built = index_shards(str(tmp_path / "a.tar"))
    assert held(built.index) == {"1": b"3"}
    counted = built.notes[0]
    assert "1 member: " in counted
    assert sort in counted
    assert f"(such as {name!r})" in counted


def test_a_tar_without_a_sample_says_what_it_holds(tmp_path: Path) -> None:
    members = {f"{number}.{kind}": b"3" for number in range(3) for kind in ("input.jpg", "outputs.cls")}
    path = write_tar(tmp_path / "a.tar", members)
    said = refusal(build_index, str(path))
    for part in ("a.tar", "no sample", "3 .input.jpg", "3 .outputs.cls", "--last-dot"):
        assert part in said
    assert sorted(held(build_index(str(path), last_dot=True))) == ["0.input", "1.input", "2.input"]


def test_shards_without_a_sample_are_left_out_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": b"0", "0.txt": b"a caption"})
    write_tar(tmp_path / "b.tar", {"1.txt": b"a caption"})
    write_tar(tmp_path / "c.tar", {})
    write_tar(tmp_path / "d.tar", {"2.png": b"2"})
    for hidden in ("._d.tar", ".d.tar"):
        (tmp_path / hidden).write_bytes(b"left by a file manager")
    written = write_index(str(tmp_path))
    assert held(written.index) == {"0": b"0", "2": b"2"}
    assert [note.partition(": ")[2].split(":")[0] for note in written.notes if note.startswith("left out")] == [
        str(tmp_path / "b.tar"), str(tmp_path / "c.tar"),
    ]  # fmt: skip
    loaded = load_index(str(tmp_path))
    assert loaded.left_out == (str(tmp_path / "b.tar"), str(tmp_path / "c.tar"))
    assert unlisted(str(tmp_path), loaded) == ()
    assert held(load_index(str(tmp_path / "[abcd].tar"))) == {"0": b"0", "2": b"2"}
    with pytest.raises(UserError, match=r"b\.tar"):
        write_index(str(tmp_path), strict=True)
    assert "c.tar" in refusal(build_index, str(tmp_path / "c.tar"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["Git LFS", "git lfs pull"]),
        (b"\xfd7zXZ\0" + bytes(600), ["compressed", "unxz"]),
        (b"\x1f\x8b" + bytes(600), ["compressed", "gunzip"]),
        (b"PK\x03\x04" + bytes(600), ["zip", "distgan pack"]),
        (b"\x89PNG\r\n\x1a\n", ["image", "distgan pack"]),
        (b"\xff\xd8\xff\xe0" + bytes(600), ["image", "distgan pack"]),
        (b"RIFF\x24\0\0\0WEBPVP8 " + bytes(600), ["image", "distgan pack"]),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(600), ["not a tar"]),
        (b"<html>not found</html>", ["truncated"]),
    ],
)
def test_files_that_are_named_like_tars(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    said = refusal(build_index, str(tmp_path))
    assert all(part in said for part in ["a.tar", *parts])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("shard-0.tar.gz", ["compressed", "'shard-0.tar.gz'"]),
        ("cats/0.jpg", ["distgan pack", "'0.jpg'"]),
        ("all.zip", ["distgan pack ZIP"]),
        ("lines.txt", ["distgan pack FILE"]),
        ("other.bin", ["*.tar"]),
    ],
)
def test_folders_without_a_tar_say_what_to_do_with_what_they_hold(tmp_path: Path, name: str, parts: list[str]) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    for action in (build_index, load_index):
        said = refusal(action, str(tmp_path))
        assert all(part in said for part in [str(tmp_path), *parts])


def test_a_name_that_is_not_there_is_not_explained_by_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "old.tar.gz").write_bytes(b"x")
    (tmp_path / "0.jpg").write_bytes(b"x")
    for name in ("absent", "absent-{0..2}.tar"):
        said = refusal(build_index, str(tmp_path / name))
        assert str(tmp_path / "absent") in said
        assert "no file or folder" in said
        assert not any(part in said for part in ("compressed", "old.tar.gz", "0.jpg"))


def test_text_that_is_no_line_is_counted_with_its_reason(tmp_path: Path) -> None:
    lines = {"0.txt": b"one\rtwo\r", "1.txt": b"\xff\xfeo\0", "2.txt": b"good\r\n"}
    path = write_tar(tmp_path / "a.tar", lines)
    built = index_shards(str(path))
    (note,) = built.notes
    for part in ("2 text samples", "'0'", str(path), "more than one line"):
        assert part in note
    assert built.index.vocabulary is not None
    assert set(built.index.vocabulary[2:]) == set("good")
    assert index_shards(str(write_tar(tmp_path / "b.tar", {"2.txt": b"good\r\n"}))).notes == ()
