"""Tars as GNU tar, Python's tarfile and webdataset write them index to the samples that were put in, or say why not."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from distgan.config import DataConfig
from distgan.data.index.build import build_index, index_shards
from distgan.data.index.checks import unlisted
from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.data.index.table import Index
from distgan.data.reader import read_samples
from distgan.data.storage.tar import WindowReader
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


@pytest.mark.parametrize("format", FORMATS)
@settings(FEW, max_examples=8)
@given(
    samples=SAMPLES,
    blocking=st.sampled_from([1, 20, 300]),
    linked=st.booleans(),
    symbolic=st.booleans(),
    appended=st.booleans(),
)
def test_gnu_tar(
    tmp_path_factory: pytest.TempPathFactory,
    samples: Mapping[str, bytes],
    format: str,
    blocking: int,
    linked: bool,
    symbolic: bool,
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
    if symbolic:
        (source / "a symbolic link.png").symlink_to(names[0])
        names.append("a symbolic link.png")
    path = folder / "a.tar"
    tar = [shutil.which("tar") or "tar", f"--format={format}", f"--blocking-factor={blocking}", "-C", str(source)]
    archives = [folder / "0.tar", folder / "1.tar"] if appended else [folder / "0.tar"]
    halves = [names[::2], names[1::2]] if appended else [names]
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
    assert ["1 symbolic links" in note for note in built.notes] == [True] * symbolic


@settings(FEW, max_examples=20)
@given(samples=SAMPLES, each=st.one_of(st.none(), st.integers(1, 3)))
def test_webdataset(tmp_path_factory: pytest.TempPathFactory, samples: Mapping[str, bytes], each: int | None) -> None:
    """One tar of TarWriter, or ShardWriter's tars of `each` samples."""
    folder = tmp_path_factory.mktemp("tar")
    with (
        webdataset.TarWriter(str(folder / "a.tar"))
        if each is None
        else webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=each, verbose=0)
    ) as writer:
        for number, (key, content) in enumerate(samples.items()):
            writer.write({"__key__": key, "png": content, "cls": number, "json": {"a": 1}})
    built = index_shards(str(folder))
    assert len(built.index.shards) == (1 if each is None else -(-len(samples) // each))
    assert held(built.index) == samples
    labels = {built.index.key(sample): int(label) for sample, label in enumerate(built.index.labels)}
    assert labels == {key: number for number, key in enumerate(samples)}
    assert [f"{len(samples)} .json" in note for note in built.notes] == [True]


def test_what_the_encoder_of_webdataset_writes_is_read(tmp_path: Path) -> None:
    """Arrays, pictures and class numbers as objects; extensions with dots, class names and features beside them."""
    classes = [3, 0, "2\n", "1"]
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for number, label in enumerate(classes):
            pixels = np.full((8, 8, 3), 10 * number, np.uint8)
            sample = {"png": pixels} if number % 2 else {"jpg": Image.fromarray(pixels)}
            beside = {"seg.png": pixels[..., 0], "txt": f"class {label}", "npy": np.arange(3.0)}
            writer.write({"__key__": f"train/{number:03d}", **sample, "cls": label, **beside})
    built = index_shards(str(tmp_path))
    index = built.index
    assert [shard.count for shard in index.shards] == [3, 1]
    assert [index.key(sample) for sample in range(4)] == [f"train/{number:03d}" for number in range(4)]
    batch = read_samples(DataConfig(path="unused", resolution=8, labels=True), index, range(4))
    assert batch.failures == []
    assert batch.labels is not None
    assert batch.labels.tolist() == [3, 0, 2, 1]
    assert batch.data.float().mean((1, 2, 3)).tolist() == [0, 10, 20, 30]
    note = built.notes[0]
    for part in ("12 members", "4 .seg.png", "4 .txt", "4 .npy"):
        assert part in note


def test_images_of_webdataset_under_an_extension_with_dots(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"x{number}", "image.png": b"%d" % number, "cls": number})
    said = refusal(build_index, str(tmp_path))
    for part in ("no sample", "3 .image.png (such as 'x0.image.png')", "3 .cls", "--last-dot"):
        assert part in said
    built = index_shards(str(tmp_path), last_dot=True)
    assert held(built.index) == {f"x{number}.image": b"%d" % number for number in range(3)}
    # The labels have other keys now, which the user must know.
    assert built.index.num_classes == 0
    (note,) = built.notes
    assert "3 .cls labels without a sample (such as 'x" in note


def test_class_names_as_labels_are_refused_by_name(tmp_path: Path) -> None:
    """webdataset's own decoder takes only numbers too."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "x", "png": b"", "cls": "cat"})
    said = refusal(build_index, str(tmp_path))
    for part in ("a.tar", "'x.cls'", "found 'cat'", "expected a whole number"):
        assert part in said
    with pytest.raises(webdataset.autodecode.DecodingError):
        list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("pil"))


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
    assert "9 members" in counted
    assert "2 .txt (such as '0.txt')" in counted
    assert counted.count("(such as") == 6  # of 8 sorts
    assert "2 other sorts" in counted
    assert "--last-dot" in hint
    assert sorted(held(index_shards(str(path), last_dot=True).index)) == ["0", "1", "5", "Track 2.0"]


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
    assert "skipped 1 member: " in counted
    assert sort in counted
    assert f"(such as {name!r})" in counted


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        *(["--format=pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")),
    ],
)
def test_sparse_members_of_gnu_tar_are_refused_by_name(tmp_path: Path, options: list[str]) -> None:
    """Their bytes in the tar are not those of the file."""
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "-C", str(tmp_path), *options, "-S", "-cf", str(path), "a.png"], check=True)
    assert path.stat().st_size < 1 << 20  # else it is stored whole
    said = refusal(build_index, str(path))
    what = said.replace(str(path), "")  # pytest names the folder after this test
    assert "a.png" in what
    assert "sparse" in what


def test_volumes_of_gnu_tar_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 40)
    volumes = [tmp_path / f"{number}.tar" for number in range(3)]
    files = [option for path in volumes for option in ("-f", str(path))]
    command = ["tar", "-C", str(tmp_path), "-M", "-L", "10", "-c", *files, "a.png", "b.png"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)  # it would ask for one volume more
    # The first ends inside a member; the second goes on with it, which is no file of its own.
    for path, part in ((volumes[0], "truncated"), (volumes[1], "another volume")):
        said = refusal(build_index, str(path))
        assert str(path) in said
        assert part in said


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu"])
def test_folders_labels_and_listings_of_gnu_tar_are_no_members_to_tell_of(tmp_path: Path, format: str) -> None:
    (tmp_path / "source/k").mkdir(parents=True)
    (tmp_path / "source/k/a.png").write_bytes(b"abc")
    options = [[]] if format == "v7" else [["-V", "a label"], ["-g", str(tmp_path / "snapshot")]]
    for option in options:
        path = tmp_path / "a.tar"
        subprocess.run(
            ["tar", "-C", str(tmp_path / "source"), f"--format={format}", *option, "-cf", str(path), "k"], check=True
        )
        built = index_shards(str(path))
        assert held(built.index) == {"k/a": b"abc"}
        assert built.notes == ()


def test_folders_of_tars_before_posix(tmp_path: Path) -> None:
    """Regular files whose names end in a slash (see "typeflag" in POSIX.1-2017, pax); tarfile reads them alike."""
    data = bytearray(one(tmp_path, "a", "1"))
    folder = bytearray(512)
    folder[:9] = b"folder.d/"
    folder[100:107], folder[124:135], folder[148:156] = b"0000755", b"00000000003", b" " * 8
    folder[148:156] = b"%06o\0 " % sum(folder)
    path = tmp_path / "c.tar"
    path.write_bytes(bytes(folder) + bytes(data))
    with tarfile.open(path) as tar:
        assert [info.name for info in tar if info.isfile()] == ["1.png"]
    built = index_shards(str(path))
    assert held(built.index) == {"1": b"1"}
    assert built.notes == ()


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


def test_tars_that_were_concatenated_are_read_in_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces of object stores cost a round trip each: the windows must grow to 1 MiB over small tars."""
    whole = b"".join(one(tmp_path, "a", str(number)) for number in range(40))
    path = tmp_path / "c.tar"
    path.write_bytes(whole)
    fetched = []
    fetch = WindowReader._fetch

    def counted(self: WindowReader, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return fetch(self, start, stop)

    monkeypatch.setattr(WindowReader, "_fetch", counted)
    assert len(build_index(str(path))) == 40
    assert len(fetched) <= 8
    assert sum(fetched) <= 2 * len(whole)
