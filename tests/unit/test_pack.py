"""Packing: deterministic shards that other tools read, and clear refusals."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distgan.data.index.loading import load_index
from distgan.data.packing.pack import PackReport, pack, shuffled
from distgan.data.packing.tar_writer import ShardSize
from distgan.errors import UserError
from tests.shards import build_index
from tests.sources import TREE, digests, members, numbered_images, png, write_tree, write_zip


def real_data(name: str) -> Path:
    """A file of real data, from $DISTGAN_TEST_DATA or shared/data beside the checkout; skips the test without it."""
    folder = Path(os.environ.get("DISTGAN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder}; set DISTGAN_TEST_DATA to the folder that holds it")
    return folder / name


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
