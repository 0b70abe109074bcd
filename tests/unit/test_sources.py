"""Sources of images: what is found, how it is labeled, and one clear line for each mistake."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from distgan.data.packing.sources.opening import open_source
from distgan.data.packing.sources.source import Source
from distgan.errors import UserError
from tests.sources import TREE, one_line, png, write_idx, write_tree, write_zip


def contents(source: Source) -> list[bytes]:
    return [source.read(slot) for slot in source.slots]


EXPECTED = (["cat/x/deep.png", "dog/a.JPG", "dog/b.png"], [png(1), png(2), png(3)], [0, 1, 1], ("cat", "dog"))


def observed(source: Source) -> tuple:
    assert source.labels is not None
    return list(source.names), contents(source), source.labels.tolist(), source.class_names


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path / "tree", TREE))
    assert observed(source) == EXPECTED
    [note] = source.notes
    assert note.startswith("ignored 1 file ")
    assert note.endswith(": 1 .txt")


@pytest.mark.parametrize("top", ["", "photos/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_its_folder(tmp_path: Path, top: str, method: int) -> None:
    files = {top + name: data for name, data in TREE.items()} | {"__MACOSX/dog/._b.png": b"-"}
    source = open_source(write_zip(tmp_path / "tree.zip", files, method))
    assert observed(source) == EXPECTED
    assert observed(pickle.loads(pickle.dumps(source))) == EXPECTED  # noqa: S301 - as a worker process gets it


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path / "flat", {"b.png": png(2), "a.webp": png(1)}))
    assert list(source.names) == ["a.webp", "b.png"]
    assert source.labels is None
    assert source.class_names is None


def test_windows_separators_in_a_zip(tmp_path: Path) -> None:
    source = open_source(write_zip(tmp_path / "w.zip", {"cat\\a.png": png(1), "dog\\a.png": png(2)}))
    assert source.class_names == ("cat", "dog")


def test_images_at_two_levels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mixed: .*\(cat/\).*\(a\.png\)") as error:
        open_source(write_tree(tmp_path / "mixed", {"a.png": png(1), "cat/b.png": png(2)}))
    one_line(error)


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"-"}])
def test_no_images(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "none").mkdir()
    for source in (write_tree(tmp_path / "none", files), write_zip(tmp_path / "none.zip", files)):
        with pytest.raises(UserError, match="found no images") as error:
            open_source(source)
        assert str(source) in one_line(error)


def test_links_are_followed_only_inside(tmp_path: Path) -> None:
    secret = write_tree(tmp_path / "elsewhere", {"secret.png": png(9), "more/secret.png": png(9)})
    root = write_tree(tmp_path / "root", {"a.png": png(1)})
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "outside.png").symlink_to(secret / "secret.png")
    (root / "nowhere.png").symlink_to(root / "missing.png")
    (root / "folder").symlink_to(secret / "more")
    os.mkfifo(root / "pipe.png")
    source = open_source(root)
    assert list(source.names) == ["a.png", "inside.png"]
    assert any("3 links" in note for note in source.notes)


def test_a_link_to_the_folder_itself_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write_tree(tmp_path / "real", {"a.png": png(1)}))
    assert contents(open_source(tmp_path / "link")) == [png(1)]


# dataset.json


STYLEGAN = {"00000/img0.png": png(0), "00000/img1.png": png(1), "00001/img2.png": png(2)}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [([["00000/img1.png", 0], ["00000/img0.png", 7], ["00001/img2.png", 3]], [7, 0, 3]), (None, None)],
)
def test_dataset_json_overrides_folders(
    tmp_path: Path, zipped: bool, labels: list | None, expected: list | None
) -> None:
    files = STYLEGAN | {"dataset.json": json.dumps({"labels": labels}).encode()}
    source = open_source(write_zip(tmp_path / "s.zip", files) if zipped else write_tree(tmp_path / "s", files))
    assert (source.labels.tolist() if source.labels is not None else None) == expected
    assert source.class_names is None
    assert source.notes == ()


GOOD = [["00000/img0.png", 0], ["00000/img1.png", 1], ["00001/img2.png", 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a label file"),
        (b"[" * 100_000, "not a label file"),
        (b"\xff", "not a label file"),
        (b"[]", "not a label file"),
        (b"{}", "not a label file"),
        (b'{"labels": 3}', "labels: found int"),
        (b'{"labels": [3]}', "entry 0 of labels is not"),
        (json.dumps({"labels": [*GOOD[:2], ["00001/img2.png", 0.5]]}), "label of 00001/img2.png: found 0.5"),
        (json.dumps({"labels": [*GOOD[:2], ["00001/img2.png", True]]}), "label of 00001/img2.png: found True"),
        (json.dumps({"labels": [*GOOD[:2], ["00001/img2.png", -1]]}), "label of 00001/img2.png: found -1"),
        (json.dumps({"labels": [*GOOD[:2], ["00001/img2.png", "2"]]}), "label of 00001/img2.png: found '2'"),
        (
            json.dumps({"labels": [*GOOD[:2], ["00001/img2.png", 2**40]]}),
            "label of 00001/img2.png: found 1099511627776",
        ),
        (json.dumps({"labels": GOOD[:2]}), r"no label for 00001/img2.png \(1 of 3"),
        (json.dumps({"labels": [*GOOD, ["x\n.png", 1]]}), r"label for x\?\.png, which is not an image"),
        (json.dumps({"labels": [*GOOD, ["00000/img0.png", 5]]}), "00000/img0.png has two labels, 0 and 5"),
    ],
)
def test_wrong_dataset_json(tmp_path: Path, content: str | bytes, message: str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(UserError, match=message) as error:
        open_source(write_zip(tmp_path / "s.zip", STYLEGAN | {"dataset.json": data}))
    assert "s.zip/dataset.json" in one_line(error)


# idx


@pytest.mark.parametrize(("images", "labels"), [("", ""), (".gz", ".gz"), ("", ".gz"), (".gz", "")])
@pytest.mark.parametrize("stem", ["train-images-idx3-ubyte", "train-images.idx3-ubyte"])
def test_an_idx_pair(tmp_path: Path, images: str, labels: str, stem: str) -> None:
    pixels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    path = write_idx(tmp_path / f"{stem}{images}", pixels)
    write_idx(tmp_path / (stem.replace("images", "labels").replace("idx3", "idx1") + labels), np.array([2, 0, 9]))
    source = open_source(path)
    assert np.array_equal([source.read(slot) for slot in source.slots], pixels)
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 9]
    assert source.names[2] == f"{path.name}[2]"


def test_an_idx_file_without_labels_says_so(tmp_path: Path) -> None:
    source = open_source(write_idx(tmp_path / "images-idx3-ubyte", np.zeros((2, 3, 3))))
    assert source.labels is None
    assert "labels-idx1-ubyte" in source.notes[0]


def test_idx_labels_that_differ_in_number(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "images-idx3-ubyte", np.zeros((2, 3, 3)))
    write_idx(tmp_path / "labels-idx1-ubyte", np.zeros(3))
    with pytest.raises(UserError, match=r"labels-idx1-ubyte: .*\b3\b.*\b2\b.* images-idx3-ubyte"):
        open_source(path)


def test_a_labels_file_named_as_the_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels-idx1-ubyte: .*\b1 dimensions .*labels.*\b3\b"):
        open_source(write_idx(tmp_path / "labels-idx1-ubyte", np.zeros(3)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(17),
            r"truncated: .*\b17 .*\b18 .*2 x 3 x 3 ",
        ),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(99), "longer than its header says"),
        (b"\0\0\x08\x03" + bytes(5), "truncated inside its header"),
        (b"\0\0\x0d\x03" + bytes(12), "not an idx file of uint8"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 0, 3, 3), "found no images"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "at most"),
    ],
)
def test_wrong_idx_files(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(UserError, match=message) as error:
        open_source(path)
    assert str(path) in one_line(error)


def test_idx_images_above_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distgan.data.packing.sources.idx.MAX_PIXELS", 8)
    with pytest.raises(UserError, match=r"images-idx3-ubyte: .*3 x 3, .*\b8 pixels"):
        open_source(write_idx(tmp_path / "images-idx3-ubyte", np.zeros((2, 3, 3))))


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "images-idx3-ubyte.gz", np.random.default_rng(0).integers(0, 255, (9, 30, 30)))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"images-idx3-ubyte\.gz: cannot read .*download"):
        open_source(path)


# What a source is


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    source = open_source("builtin:digits")
    digits = load_digits()
    assert len(source.names) == 1797
    assert source.labels is not None
    assert np.array_equal(source.labels, digits.target)
    assert source.class_names == tuple("0123456789")
    pixels = np.stack([source.read(slot) for slot in source.slots])
    assert pixels.dtype == np.uint8
    assert pixels.max() == 255  # the 17 gray levels span the whole range
    assert np.abs(pixels / 255 - digits.images / 16).max() <= 0.5 / 255


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:faces", "builtin:digits"),
        ("https://example.com/a.zip", "copy it to a local disk"),
        ("missing", "No such file"),
        ("bad\0name", "null"),
    ],
)
def test_unknown_sources(source: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_source(source)
    one_line(error)


def test_files_that_are_no_sources(tmp_path: Path) -> None:
    for name, data, message in [
        ("a.png", png(1), "found one image"),
        ("a.tar", bytes(1024)[:0] + b"a.png", "distgan index"),
        ("a.zip", b"not a zip", "not a readable zip archive"),
        ("empty", b"", "not a source of samples"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            open_source(tmp_path / name)
        one_line(error)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "images")
    with pytest.raises(UserError, match="neither a file nor a folder") as error:
        open_source(tmp_path / "images")
    one_line(error)


def test_a_link_to_itself_counts_as_a_link(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", {"a.png": png(1)})
    (root / "loop.png").symlink_to("loop.png")
    source = open_source(root)
    assert source.names == ["a.png"]
    assert any("1 link " in note for note in source.notes)
