"""Tars as GNU tar, Python's tarfile and webdataset write them index to the samples that were put in, or say why not."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distgan.data.index.build import build_index, index_shards
from distgan.data.index.checks import unlisted
from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.data.index.table import Index
from distgan.errors import UserError
from tests.shards import refusal, write_tar

CHARACTERS = st.characters(codec="utf-8", exclude_characters="/\0\n.", exclude_categories=["Cs", "Cc"])
PARTS = st.one_of(st.text(CHARACTERS, min_size=1, max_size=12), st.text("ab", min_size=70, max_size=110))
KEYS = st.lists(PARTS, min_size=1, max_size=3).map("/".join).filter(lambda key: not key.startswith("__"))
CONTENTS = st.binary(max_size=1500)
SAMPLES = st.dictionaries(KEYS, CONTENTS, min_size=1, max_size=5)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FORMATS = ["v7", "ustar", "oldgnu", "gnu", "pax"]


def held(index: Index) -> dict[str, bytes]:
    """Key and bytes of each sample, as they lie in the tars."""
    found = {}
    for sample in range(len(index)):
        shard, offset, size, *_ = index.entry(sample)
        content = Path(index.shards[shard].url).read_bytes()
        assert 0 < offset <= len(content) - size
        found[index.key(sample)] = content[offset : offset + size]
    return found


@FEW
@given(
    parts=st.lists(SAMPLES, min_size=1, max_size=3),
    links=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([tarfile.LNKTYPE, tarfile.SYMTYPE])), max_size=3),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    padding=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
)
def test_tarfile(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[dict[str, bytes]],
    links: list[tuple[int, bytes]],
    format: int,
    padding: int,
    order: object,
) -> None:
    """Concatenated as they are, with links among them; tarfile itself says what is in the result."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    seen: set[str] = set()
    whole = b""
    for number, part in enumerate(parts):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
            names = [key for key in part if key not in seen]
            seen.update(names)
            order.shuffle(names)  # type: ignore[attr-defined]
            for key in names:
                for name, content in ((f"{key}.png", part[key]), (f"{key}.json", b"{}")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    try:
                        tar.addfile(info, io.BytesIO(content))
                    except ValueError:  # ustar cannot hold such a name
                        return
            for link, (target, kind) in enumerate(links if names else ()):
                info = tarfile.TarInfo(f"link {number} {link}.png")
                info.type, info.linkname = kind, f"{names[target % len(names)]}.png"
                try:
                    tar.addfile(info)
                except ValueError:
                    return
        whole += buffer.getvalue() + bytes(512 * padding)
    path.write_bytes(whole)
    expected = {}
    with tarfile.open(path, ignore_zeros=True) as tar:
        for info in tar:
            if info.name.endswith(".png") and not info.issym():
                content = tar.extractfile(info)
                assert content is not None
                expected[info.name[: -len(".png")]] = content.read()
        symbolic = sum(info.issym() for info in tar)
    if not expected:
        return
    built = index_shards(str(path))
    assert held(built.index) == expected
    (note,) = built.notes
    assert f"{len(expected) - _hard_links(path)} .json" in note
    assert (f"{symbolic} symbolic links" in note) == (symbolic > 0)


def _hard_links(path: Path) -> int:
    with tarfile.open(path, ignore_zeros=True) as tar:
        return sum(info.islnk() for info in tar)


@settings(FEW, max_examples=12)
@given(
    samples=SAMPLES,
    format=st.sampled_from(FORMATS),
    blocking=st.sampled_from([1, 20, 300]),
    linked=st.booleans(),
    appended=st.booleans(),
)
def test_gnu_tar(
    tmp_path_factory: pytest.TempPathFactory,
    samples: Mapping[str, bytes],
    format: str,
    blocking: int,
    linked: bool,
    appended: bool,
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    source = folder / "source"
    names = []
    expected = dict(samples)
    for key, content in samples.items():
        file = source / f"{key}.png"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        except OSError:  # one key is a folder of another, or too long for this file system
            return
        names.append(f"{key}.png")
    if linked:
        os.link(source / names[0], source / "a link.png")
        names.append("a link.png")
        expected["a link"] = samples[names[0][: -len(".png")]]
    path = folder / "a.tar"
    tar = [shutil.which("tar") or "tar", f"--format={format}", f"--blocking-factor={blocking}", "-C", str(source)]
    archives = [folder / "0.tar", folder / "1.tar"] if appended else [folder / "0.tar"]
    halves = [names[::2], names[1::2]] if appended and not linked else [names]
    for archive, half in zip(archives, halves, strict=False):
        listed = folder / "names"
        listed.write_bytes(b"".join(name.encode() + b"\0" for name in half))
        written = subprocess.run(
            [*tar, "-cf", str(archive), "--null", "--verbatim-files-from", "-T", str(listed)], capture_output=True
        )
        if written.returncode:  # v7 and ustar cannot hold every name
            return
    path.write_bytes(b"".join(archive.read_bytes() for archive in archives if archive.exists()))
    built = index_shards(str(path))
    assert held(built.index) == expected
    assert built.notes == ()


@settings(FEW, max_examples=20)
@given(samples=SAMPLES)
def test_webdataset(tmp_path_factory: pytest.TempPathFactory, samples: Mapping[str, bytes]) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, (key, content) in enumerate(samples.items()):
            writer.write({"__key__": key, "png": content, "cls": number, "json": {"a": 1}})
    built = index_shards(str(path))
    assert held(built.index) == samples
    labels = {built.index.key(sample): int(label) for sample, label in enumerate(built.index.labels)}
    assert labels == {key: number for number, key in enumerate(samples)}
    assert [f"{len(samples)} .json" in note for note in built.notes] == [True]


def one(folder: Path, name: str, key: str) -> bytes:
    """A tar of one image, as GNU tar writes it."""
    (folder / f"{key}.png").write_bytes(key.encode())
    path = folder / f"{name}.tar"
    subprocess.run(["tar", "-C", str(folder), "-cf", str(path), f"{key}.png"], check=True)
    return path.read_bytes()


@pytest.mark.parametrize("between", [0, 512, 1024, 10_240, 70_000])
def test_tars_that_were_concatenated(tmp_path: Path, between: int) -> None:
    first, second = one(tmp_path, "a", "1"), one(tmp_path, "b", "2")
    (tmp_path / "c.tar").write_bytes(first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512 + 512) + second)
    (tmp_path / "d.tar").write_bytes(first + bytes(between // 512 * 512) + second)
    for name in "cd":
        index = build_index(str(tmp_path / f"{name}.tar"))
        assert held(index) == {"1": b"1", "2": b"2"}
        listed = subprocess.run(["tar", "-itf", str(tmp_path / f"{name}.tar")], capture_output=True, text=True)
        assert listed.stdout.split() == ["1.png", "2.png"]


@pytest.mark.parametrize("end", [512, 1024, 1000, 100_000])
def test_ends_of_any_length(tmp_path: Path, end: int) -> None:
    data = one(tmp_path, "a", "1")[:1024]  # its header and the block of its data
    (tmp_path / "c.tar").write_bytes(data + bytes(end))
    assert held(build_index(str(tmp_path / "c.tar"))) == {"1": b"1"}


@pytest.mark.parametrize("after", [b"no tar at all", b"x" * 600, b"\1" * 20_000])
def test_what_follows_the_end_mark_and_is_no_tar_is_refused_with_its_place(tmp_path: Path, after: bytes) -> None:
    data = one(tmp_path, "a", "1")
    (tmp_path / "c.tar").write_bytes(data + after)
    said = refusal(build_index, str(tmp_path / "c.tar"))
    assert "c.tar" in said
    assert f"byte {len(data):,}" in said


def test_a_file_of_zeros_is_no_empty_tar_for_ever(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        file.truncate(1 << 40)
    assert "only zeros" in refusal(build_index, str(tmp_path / "a.tar"))


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
    for part in (
        "2 .txt (such as '0.txt')", "1 members without an extension", "1 hidden members",
        "1 .cls labels without a sample", "1 .0.png (such as 'Track 2.0.png')", "1 symbolic links (such as '2.png')",
        "'3.png'", "'4.png'",
    ):  # fmt: skip
        assert part in counted or "other sorts" in counted
    assert "9 members" in counted
    assert "--last-dot" in hint
    assert sorted(held(index_shards(str(path), last_dot=True).index)) == ["0", "1", "5", "Track 2.0"]


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
