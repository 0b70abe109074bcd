"""Packing: deterministic shards that other tools read, and clear refusals."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from distgan.data.index.build import build_index
from distgan.data.index.loading import load_index
from distgan.data.packing.pack import PackReport, pack, shuffled
from distgan.data.packing.sources.arrays import encode_point
from distgan.data.packing.tar_writer import ShardSize, ShardWriter, ustar_header
from distgan.errors import UserError
from tests.sources import TREE, digests, numbered_images, png, write_tree, write_zip


def real_data(name: str) -> Path:
    """A file of real data, from $DISTGAN_TEST_DATA or shared/data beside the checkout; skips the test without it."""
    folder = Path(os.environ.get("DISTGAN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder}; set DISTGAN_TEST_DATA to the folder that holds it")
    return folder / name


def members(folder: Path) -> list[tuple[str, bytes]]:
    """All members of all shards in order, as the standard library reads them."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found.append((info.name, file.read()))
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return numbered_images(tmp_path / "images", 50)


def gray(data: bytes) -> int:
    return int(np.asarray(Image.open(io.BytesIO(data)))[0, 0])


# What is written


def test_samples_hold_image_and_label_under_the_number_of_the_source(images: Path, tmp_path: Path) -> None:
    report = pack(images, tmp_path / "out", shard_size=20, workers=1)
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in members(tmp_path / "out"):
        key, extension = name.split(".")
        samples.setdefault(key, {})[extension] = data
    assert sorted(samples) == [f"{i:08d}" for i in range(50)]
    for key, sample in samples.items():
        assert gray(sample["png"]) == int(key)
        assert int(sample["cls"]) == (int(key) >= 25)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert report == PackReport((tmp_path / "out"), 50, 3, sum(sizes), 2, ("a", "b"), (), ())
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert len(tar.getnames()) == 40


def test_the_index_is_that_of_the_shards(images: Path, tmp_path: Path) -> None:
    pack(images, tmp_path / "out", shard_size=20, workers=1)
    index = load_index(str(tmp_path / "out"))
    anew = build_index(str(tmp_path / "out"))
    assert index.fingerprint == anew.fingerprint
    assert index.class_names == ("a", "b")
    assert [shard.count for shard in index.shards] == [20, 20, 10]
    assert [index.key(sample) for sample in range(50)] == [
        name.split(".")[0] for name, _ in members(tmp_path / "out") if name.endswith(".png")
    ]
    assert index.labels.tolist() == [int(index.key(sample)) >= 25 for sample in range(50)]
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert load_index(str(tmp_path / "moved")).shards[0].url == str(tmp_path / "moved" / "shard-000000.tar")


def test_no_labels_no_cls(tmp_path: Path) -> None:
    report = pack(write_tree(tmp_path / "flat", {"a.png": png(1)}), tmp_path / "out", workers=1)
    assert [name for name, _ in members(tmp_path / "out")] == ["00000000.png"]
    assert (report.num_classes, report.class_names) == (0, None)


@pytest.mark.parametrize("shuffle", [True, False])
def test_order(images: Path, tmp_path: Path, shuffle: bool) -> None:
    pack(images, tmp_path / "out", shuffle=shuffle, seed=3, workers=1)
    order = [int(name[:8]) for name, _ in members(tmp_path / "out") if name.endswith(".cls")]
    assert order == (shuffled(50, 3).tolist() if shuffle else list(range(50)))


@given(count=st.integers(1, 2000), seed=st.integers(0, 2**63 - 1))
def test_shuffled_is_a_permutation(count: int, seed: int) -> None:
    assert np.array_equal(np.sort(shuffled(count, seed)), np.arange(count))


def philox4x64(block: int, key: int) -> tuple[int, int, int, int]:
    """Philox4x64-10 as in Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011."""
    mask = 2**64 - 1
    x0, x1, x2, x3 = block, 0, 0, 0
    k0, k1 = key, 0
    for _ in range(10):
        p0, p1 = x0 * 0xD2E7470EE14C6C93, x2 * 0xCA5A826395121157
        x0, x1, x2, x3 = (p1 >> 64) ^ x1 ^ k0, p1 & mask, (p0 >> 64) ^ x3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return x0, x1, x2, x3


def test_shuffled_is_uniform_and_stays_what_it_is() -> None:
    firsts = np.bincount([shuffled(8, seed)[0] for seed in range(4000)], minlength=8)
    assert ((firsts - 500) ** 2 / 500).sum() < 24.3  # chi-squared with 7 degrees of freedom, p = 0.001
    for count, seed in ((1, 0), (9, 0), (1000, 2**63 - 1)):
        drawn = [word for block in range(1, count // 4 + 2) for word in philox4x64(block, seed)][:count]
        assert shuffled(count, seed).tolist() == sorted(range(count), key=drawn.__getitem__)


def test_bytes_do_not_depend_on_workers_or_time(images: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2), ("four", 4)):
        pack(images, tmp_path / name, shard_size="20KB", resolution=16, workers=workers)
        os.utime(images / "a" / "003.png", (time.time() + 1000,) * 2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "four")
    assert len(list((tmp_path / "one").glob("*.tar"))) > 2


def test_a_zip_gives_the_shards_of_its_folder(tmp_path: Path) -> None:
    pack(write_tree(tmp_path / "tree", TREE), tmp_path / "a", workers=1, on_error="skip")
    pack(write_zip(tmp_path / "tree.zip", TREE), tmp_path / "b", workers=2, on_error="skip")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "size"),
    [(500, ShardSize(samples=500)), ("500", ShardSize(samples=500)), ("64MB", ShardSize(size=64_000_000)),
     ("1 gb", ShardSize(size=10**9)), ("8kB", ShardSize(size=8000))],
)  # fmt: skip
def test_shard_size(text: int | str, size: ShardSize) -> None:
    assert ShardSize.parse(text) == size


@pytest.mark.parametrize("text", ["", "0", "-3", "MB", "1.5GB", "3 apples", 0, "1TB", "9" * 40])
def test_wrong_shard_size(text: int | str) -> None:
    with pytest.raises(UserError, match=f"^shard size {re.escape(repr(str(text)))}: .*256MB"):
        ShardSize.parse(text)


def test_shards_stay_below_their_size(images: Path, tmp_path: Path) -> None:
    pack(images, tmp_path / "out", shard_size="30KB", workers=1)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert sizes == [20_480] * 6  # tars are whole multiples of 10,240 bytes
    # A sample is 2,048 bytes and an end 1,024: full up to one sample, but for the last.
    assert [shard.count for shard in load_index(str(tmp_path / "out")).shards] == [9, 9, 9, 9, 9, 5]
    pack(images, tmp_path / "single", shard_size="1KB", workers=1)
    assert len(list((tmp_path / "single").glob("*.tar"))) == 50  # a sample larger than a shard has one of its own


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


def test_other_tools_read_the_shards(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    pack(images, tmp_path / "out", shard_size=20, workers=1)
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


def test_progress_counts_to_the_total(images: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    pack(images, tmp_path / "out", workers=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (50, 50)


# Bad images


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_stops_the_pack_with_its_name(images: Path, tmp_path: Path, workers: int) -> None:
    (images / "b" / "030.png").write_bytes(png(30)[:40])
    with pytest.raises(UserError, match=r"^b/030\.png: .*JPEG.*--on-error skip$"):
        pack(images, tmp_path / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_left_out_when_asked(images: Path, tmp_path: Path, workers: int) -> None:
    (images / "b" / "030.png").write_bytes(b"hello")
    (images / "a" / "x\n.png").write_bytes(b"")
    report = pack(images, tmp_path / "out", workers=workers, on_error="skip", shuffle=False)
    assert report.samples == 50 - 1
    assert [line.partition(": ")[0] for line in report.skipped] == ["a/x?.png", "b/030.png"]
    assert all("is not a JPEG" in line for line in report.skipped)
    assert len(load_index(str(tmp_path / "out"))) == 49


def test_no_readable_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 1 samples .*: a\.png: is not a JPEG"):
        pack(write_tree(tmp_path / "in", {"a.png": b"-"}), tmp_path / "out", workers=1, on_error="skip")
    assert not (tmp_path / "out").exists()


def test_an_image_that_vanishes_or_may_not_be_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "a" / "big.png").write_bytes(bytes(3000))
    monkeypatch.setattr("distgan.data.packing.sources.folder.FolderReader.__init__.__defaults__", (2000,))
    report = pack(images, tmp_path / "out", workers=1, on_error="skip")
    [line] = report.skipped
    assert re.match(r"a/big\.png: file too large: .*2000 bytes", line)


# Options


def test_wrong_options(images: Path, tmp_path: Path) -> None:
    for options, message in [
        ({"resolution": 0}, "resolution 0"),
        ({"resolution": 10**6}, "resolution 1000000"),
        ({"image_format": "gif"}, "image format 'gif': .*keep, png, jpg, webp"),
        ({"quality": 0}, "quality 0"),
        ({"seed": -1}, "seed -1"),
        ({"on_error": "ignore"}, "on-error 'ignore'"),
        ({"workers": 0}, "workers 0"),
        ({"shard_size": "x"}, "shard size 'x'"),
    ]:
        with pytest.raises(UserError, match=message):
            pack(images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# Real data


def test_digits(tmp_path: Path) -> None:
    report = pack("builtin:digits", tmp_path / "out", shard_size=300, resolution=32, workers=1)
    assert (report.samples, report.shards, report.num_classes) == (1797, 6, 10)
    index = load_index(str(tmp_path / "out"))
    assert index.class_names == tuple("0123456789")
    # Counts of Alpaydin and Kaynak's test set, from its description in the UCI repository.
    assert np.bincount(index.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_mnist(tmp_path: Path) -> None:
    report = pack(real_data("mnist-t10k-images-idx3-ubyte.gz"), tmp_path / "out", workers=2)
    assert (report.samples, report.num_classes) == (10_000, 10)
    index = load_index(str(tmp_path / "out"))
    # The counts that Y. LeCun's MNIST is known by.
    assert np.bincount(index.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_cifar10(tmp_path: Path) -> None:
    archive = real_data("cifar10-test.zip")
    report = pack(archive, tmp_path / "out", shard_size="4MB", workers=2)
    assert (report.samples, report.num_classes) == (10_000, 10)
    assert report.class_names is not None
    with zipfile.ZipFile(archive) as original:
        names = sorted(original.namelist())
        labels: dict[str, int] = {}
        for name, data in members(tmp_path / "out"):
            key, extension = name.split(".")
            if extension == "cls":
                labels[key] = int(data)
            else:
                assert data == original.read(names[int(key)])
    assert all(names[int(key)].startswith(report.class_names[label] + "/") for key, label in labels.items())
