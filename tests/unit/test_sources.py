"""Sources of images: what is found, how it is labeled, and one clear line for each mistake."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distgan.data.packing.sources.opening import open_source
from distgan.data.packing.sources.source import InvalidSampleError, Source
from distgan.data.packing.sources.zip_archive import ZipReader
from distgan.errors import UserError


def png(value: int, side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def write_idx(path: Path, array: np.ndarray) -> Path:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def contents(source: Source) -> list[bytes]:
    return [source.read(slot) for slot in source.slots]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


TREE = {"dog/b.png": png(3), "dog/a.JPG": png(2), "cat/x/deep.png": png(1), "cat/readme.txt": b"-", "cat/.h.png": b"-"}
EXPECTED = (["cat/x/deep.png", "dog/a.JPG", "dog/b.png"], [png(1), png(2), png(3)], [0, 1, 1], ("cat", "dog"))


def observed(source: Source) -> tuple:
    assert source.labels is not None
    return list(source.names), contents(source), source.labels.tolist(), source.class_names


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path / "tree", TREE))
    assert observed(source) == EXPECTED
    assert source.notes == ("ignored 1 file that is not .jpg/.jpeg/.png/.webp: 1 .txt",)


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
    with pytest.raises(UserError, match=r"class folders \(cat/\) and outside \(a.png\)") as error:
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


# Archives from strangers


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "C:\\a.png", "..\\a.png"])
def test_names_that_lead_out_of_a_zip(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="points outside the archive") as error:
        open_source(write_zip(tmp_path / "evil.zip", {"b.png": png(1), name: png(2)}))
    one_line(error)


def test_links_in_a_zip_are_no_images(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("a.png", png(1))
    assert list(open_source(tmp_path / "l.zip").names) == ["a.png"]


def test_a_name_twice_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", png(2))
    with pytest.raises(UserError, match=r"found a\.png twice"):
        open_source(tmp_path / "twice.zip")


def patch_directory(path: Path, entry: int, offset: int, value: bytes) -> None:
    """Overwrite bytes of one entry of a zip's central directory."""
    data = bytearray(path.read_bytes())
    start = -1
    for _ in range(entry + 1):
        start = data.index(b"PK\1\2", start + 1)
    data[start + offset : start + offset + len(value)] = value
    path.write_bytes(data)


def test_an_encrypted_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "locked.zip", {"a.png": png(1)})
    patch_directory(path, 0, 8, b"\1")
    with pytest.raises(UserError, match=r"a\.png is encrypted"):
        open_source(path)


def test_overlapping_members_are_a_bomb(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bomb.zip", {"a.png": png(1), "b.png": png(2)})
    patch_directory(path, 1, 42, struct.pack("<I", 0))
    with pytest.raises(UserError, match="overlaps another member"):
        open_source(path)


def test_a_member_that_inflates_to_more_than_declared(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bomb.zip", {"a.png": bytes(50_000_000)})
    patch_directory(path, 0, 24, struct.pack("<I", 1000))
    source = open_source(path)
    tracemalloc.start()
    with pytest.raises(InvalidSampleError, match="size or checksum"):
        source.read(source.slots[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_member_above_the_cap(tmp_path: Path) -> None:
    source = open_source(write_zip(tmp_path / "big.zip", {"a.png": bytes(2000), "b.png": bytes(1000)}))
    reader = ZipReader(str(tmp_path / "big.zip"), max_bytes=1000)
    with pytest.raises(InvalidSampleError, match="at most 1000 bytes"):
        reader(source.slots[0])
    assert reader(source.slots[1]) == bytes(1000)


def test_an_unknown_compression(tmp_path: Path) -> None:
    source = open_source(write_zip(tmp_path / "x.zip", {"a.png": png(1)}, zipfile.ZIP_LZMA))
    with pytest.raises(InvalidSampleError, match="method 14"):
        source.read(source.slots[0])


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_zip(tmp_path: Path, cut: int) -> None:
    path = write_zip(tmp_path / "cut.zip", {"a.png": png(1), "b.png": os.urandom(6000)})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="not a readable zip archive") as error:
        open_source(path)
    one_line(error)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_zip_is_refused_or_read_right(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    write_zip(path, {"a/1.png": png(1), "b/2.png": png(2)})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        source = open_source(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
        return
    for slot in source.slots:
        with contextlib.suppress(InvalidSampleError):
            assert source.read(slot) in (png(1), png(2))


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
    with pytest.raises(UserError, match=r"labels-idx1-ubyte: .*found 3, expected 2, .* images-idx3-ubyte"):
        open_source(path)


def test_a_labels_file_named_as_the_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 dimensions \(a labels file\), expected 3"):
        open_source(write_idx(tmp_path / "labels-idx1-ubyte", np.zeros(3)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(17),
            "truncated: found 17 bytes, expected 18 for 2 x 3 x 3 uint8",
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
    with pytest.raises(UserError, match="found 3 x 3, expected at most 8 pixels"):
        open_source(write_idx(tmp_path / "images-idx3-ubyte", np.zeros((2, 3, 3))))


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "images-idx3-ubyte.gz", np.random.default_rng(0).integers(0, 255, (9, 30, 30)))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"cannot read the file: .*download it again"):
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
