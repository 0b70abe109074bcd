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
from distgan.data.index.build import index_shards
from distgan.data.reader import read_samples
from distgan.data.storage.tar import WindowReader
from tests.shards import build_index, held, one, refusal

CHARACTERS = st.characters(codec="utf-8", exclude_characters="/\0\n.", exclude_categories=["Cs", "Cc"])
PARTS = st.one_of(st.text(CHARACTERS, min_size=1, max_size=12), st.text("ab", min_size=70, max_size=110))
KEYS = st.lists(PARTS, min_size=1, max_size=3).map("/".join).filter(lambda key: not key.startswith("__"))
CONTENTS = st.binary(max_size=1500)
SAMPLES = st.dictionaries(KEYS, CONTENTS, min_size=1, max_size=5)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FORMATS = ["v7", "ustar", "oldgnu", "gnu", "pax"]


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
