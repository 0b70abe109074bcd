"""Text and points through index, reader and stream, and what is refused of them."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import DataConfig
from distgan.data.index.build import index_shards
from distgan.data.index.file import INDEX_NAME
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index
from distgan.data.kinds import points
from distgan.data.kinds.text import PAD, UNKNOWN, LineEncoder, decode_lines, make_vocabulary
from distgan.data.packing.sources.lines import open_lines
from distgan.data.reader import read_samples
from distgan.data.stream import open_rank_stream
from distgan.errors import UnreadableSampleError
from tests.shards import build_index, numbered_png, refusal, write_tar

from .test_index import rewrite

LINES = ["the cat sat", "on a mat", "", "naïve café ✓", "x" * 40]


def config(kind: str, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"path": "unused", "kind": kind, "num_workers": 0} | changes)


def text_index(folder: Path, lines: list[str] = LINES) -> Index:
    write_tar(folder / "a.tar", {f"{i:03d}.txt": line.encode() for i, line in enumerate(lines)})
    save_index(build_index(str(folder)), folder)
    return load_index(str(folder))


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def points_index(folder: Path, values: np.ndarray) -> Index:
    members: dict[str, bytes] = {}
    for i, point in enumerate(values):
        members |= {f"{i:03d}.npy": saved(point), f"{i:03d}.cls": str(i % 2).encode()}
    write_tar(folder / "a.tar", members)
    save_index(build_index(str(folder)), folder)
    return load_index(str(folder))


# Text


def test_a_vocabulary_is_ordered_by_frequency() -> None:
    counts = {"a": 3, "b": 7, "c": 3, "\n": 90, "\x1b": 90, PAD: 90, UNKNOWN: 90, " ": 4}
    assert make_vocabulary(counts) == (UNKNOWN, PAD, "b", " ", "a", "c")
    many = make_vocabulary({chr(0x4E00 + i): 5000 - i for i in range(5000)})
    assert many == (UNKNOWN, PAD, *(chr(0x4E00 + i) for i in range(2046)))


def test_lines_are_cut_padded_and_numbered() -> None:
    vocabulary = (UNKNOWN, PAD, "a", "b", "é")
    encode = LineEncoder(vocabulary, 4)
    for line, expected in {
        "ab": [2, 3, 1, 1],
        "é\n": [4, 1, 1, 1],
        "abab?a": [2, 3, 2, 3],
        "a?\U0001f600b": [2, 0, 0, 3],
        "": [1, 1, 1, 1],
        "a`": [2, 1, 1, 1],
    }.items():
        out = np.full(4, 99, np.uint16)
        encode(out, memoryview(line.encode()))
        assert out.tolist() == expected
    assert decode_lines(np.array([[2, 3, 1, 1], [2, 1, 0, 4], [1, 1, 1, 1]]), vocabulary) == ["ab", "a`\ufffdé", ""]


@given(st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=[PAD]), max_size=50))
def test_what_a_vocabulary_holds_comes_back(line: str) -> None:
    encode = LineEncoder(vocabulary := make_vocabulary(dict.fromkeys(line, 1)), 30)
    out = np.zeros(30, np.uint16)
    encode(out, line.encode())
    assert decode_lines(out[None], vocabulary) == [line[:30]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", "not UTF-8 text at byte 3"),
        (b"\xed\xa0\x80", "not UTF-8"),
        (b"a\nb", "more than one line"),
        (b"a" * (2**20 + 1), "1,048,577 bytes"),
    ],
)
def test_what_is_no_line_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableSampleError, match=message):
        LineEncoder((UNKNOWN, PAD, "a"), 4)(np.zeros(4, np.uint16), data)


def test_an_index_of_text_has_the_vocabulary_of_its_lines(tmp_path: Path) -> None:
    index = text_index(tmp_path)
    text = "".join(LINES)
    rest = sorted(set(text), key=lambda character: (-text.count(character), ord(character)))
    assert index.kind == "text"
    assert index.vocabulary == (UNKNOWN, PAD, *rest)
    batch = read_samples(config("text", length=12), index, range(len(LINES)))
    assert batch.data.dtype == torch.uint16
    assert decode_lines(batch.data.numpy(), index.vocabulary) == [line[:12] for line in LINES]


def test_the_fingerprint_tells_texts_of_one_length_apart(tmp_path: Path) -> None:
    first = text_index(tmp_path / "a", ["abc", "def"])
    assert text_index(tmp_path / "b", ["abc", "def"]).fingerprint == first.fingerprint
    assert text_index(tmp_path / "c", ["abc", "dfe"]).fingerprint != first.fingerprint


def test_a_bad_line_is_replaced_and_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.txt": b"good", "1.txt": b"caf\xe9", "2.txt": b"fine"})
    index = build_index(str(tmp_path))
    (failure,) = read_samples(config("text"), index, [1]).failures
    assert failure.reason == "a.tar:1: is not UTF-8 text at byte 3"


# Points


def test_points_are_read_as_float32(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 3))
    for dtype in ("<f4", "<f8"):
        index = points_index(tmp_path / dtype, values.astype(dtype))
        batch = read_samples(config("points", dimensions=3), index, [5, 0, 3])
        assert index.kind == "points"
        assert batch.data.dtype == torch.float32
        assert np.array_equal(batch.data.numpy(), values[[5, 0, 3]].astype(np.float32))
        assert batch.labels.tolist() == [1, 0, 1]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_encoded_points_come_back(values: list[float]) -> None:
    out = np.zeros(len(values), np.float32)
    points.decode_into(out, points.encode(np.array(values, np.float32)))
    assert out.tolist() == values
    assert np.load(io.BytesIO(points.encode(out)), allow_pickle=False).tolist() == values


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + bytes(8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not in NumPy's format"),
        (b"PK\3\4" + bytes(200), "not in NumPy's format"),
        (saved(np.zeros(2))[:60], "not in NumPy's format"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"\x03\x00"), r"version \(3, 0\)"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,)}"), "not in NumPy's format"),
        (header("__import__('os').system('true')"), "not in NumPy's format"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}"), "shape"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), " + " " * 9000 + "}"), "not in NumPy's"),
        (saved(np.zeros(2, ">f4")), "found >f4"),
        (saved(np.zeros(2, "<f2")), "found <f2"),
        (saved(np.zeros(2, int)), "found <i8"),
        (saved(np.array([{}, {}]), allow_pickle=True), r"found \|O"),
        (saved(np.zeros(3)), r"shape \(3,\), expected .* \(2,\) \(data\.dimensions\)"),
        (saved(np.zeros((1, 2))), r"shape \(1, 2\)"),
        (saved(np.float64(1)), r"shape \(\)"),
        (saved(np.zeros(2))[:-1], "143 bytes, expected 144"),
        (saved(np.zeros(2)) + b"\0", "145 bytes, expected 144"),
        (saved(np.array([0, np.nan])), "not finite"),
        (saved(np.array([0, 1e300])), "not finite in float32"),
    ],
)
def test_what_is_no_point_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableSampleError, match=message) as error:
        points.decode_into(np.zeros(2, np.float32), memoryview(data))
    assert "\n" not in str(error.value)


def test_the_fingerprint_tells_points_apart(tmp_path: Path) -> None:
    """All headers of points are alike."""
    prints = {points_index(tmp_path / str(i), np.full((2, 2), float(i))).fingerprint for i in range(3)}
    assert len(prints) == 3


# Kinds


def test_what_lies_beside_images_is_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.txt": b"caption", "0.npy": b"features", "0.png": numbered_png(3), "1.txt": b"-"})
    index = build_index(str(tmp_path))
    assert (index.kind, len(index), index.vocabulary) == ("images", 1, None)
    write_tar(tmp_path / "a.tar", {"0.txt": b"caption", "0.npy": saved(np.zeros(2))})
    assert build_index(str(tmp_path)).kind == "points"


def test_shards_of_another_kind_are_left_out_or_refused(tmp_path: Path) -> None:
    text_index(tmp_path / "t")
    write_tar(tmp_path / "p" / "a.tar", {"0.png": numbered_png(3)})
    save_index(build_index(str(tmp_path / "p")), tmp_path / "p")
    both = [str(tmp_path / "p"), str(tmp_path / "t")]
    built = index_shards(both)
    assert [shard.url for shard in built.index.shards] == [str(tmp_path / "p" / "a.tar")]
    (note,) = built.notes
    assert "left out" in note
    assert "t/a.tar: found only text" in note
    assert "t/a.tar: found only text" in refusal(partial(index_shards, strict=True), both)
    assert "the kind of samples (text) or the vocabulary differs" in refusal(load_index, both)
    text_index(tmp_path / "u", ["other words"])
    assert "the vocabulary differs" in refusal(load_index, [str(tmp_path / "t"), str(tmp_path / "u")])


@pytest.mark.parametrize(
    "vocabulary",
    [
        None,
        [],
        [UNKNOWN],
        [PAD, UNKNOWN],
        [UNKNOWN, "a"],
        [UNKNOWN, PAD, "a", "a"],
        [UNKNOWN, PAD, "ab"],
        [UNKNOWN, PAD, ""],
        [UNKNOWN, PAD, "\x1b"],
        [UNKNOWN, PAD, 7],
        [UNKNOWN, PAD, *map(chr, range(0x4E00, 0x4E00 + 2047))],
    ],
)
def test_a_strangers_vocabulary_is_checked(tmp_path: Path, vocabulary: Any) -> None:
    text_index(tmp_path)
    rewrite(tmp_path / INDEX_NAME, lambda header, table, body: table.update(vocabulary=vocabulary))
    assert "index" in refusal(load_index, str(tmp_path))


def test_the_config_must_say_the_kind_of_the_shards(tmp_path: Path) -> None:
    index = text_index(tmp_path)
    for settings in (config("points"), config("images", resolution=8)):
        said = refusal(lambda settings=settings: open_rank_stream(settings, 0, index, start=0, micro_batch=4))
        assert said.endswith("hold text; set data.kind=text, or set data.path to other shards")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_text_or_points_holds_what_the_index_says(tmp_path: Path, workers: int) -> None:
    values = np.random.default_rng(1).normal(size=(11, 2)).astype(np.float32)
    lines = [f"line {i}" for i in range(11)]
    text, numbers = text_index(tmp_path / "t", lines), points_index(tmp_path / "p", values)
    for settings, index in ((config("text", length=9), text), (config("points"), numbers)):
        settings = settings.model_copy(update={"num_workers": workers})
        stream = open_rank_stream(settings, 5, index, start=3, micro_batch=4)
        seen: list[int] = []
        for _ in range(6):
            batch = next(stream)
            seen += batch.indices.tolist()
            if settings.kind == "points":
                assert np.array_equal(batch.data.numpy(), values[batch.indices])
            else:
                found = decode_lines(batch.data.numpy(), index.vocabulary or ())
                assert found == [lines[sample] for sample in batch.indices.tolist()]
        stream.close()
        assert sorted(seen[8:19]) == list(range(11))  # positions 11 to 21, an epoch


ENDS = st.sampled_from(["", "\n", "\r\n", "\r"])


@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\ufeff")), ENDS), min_size=1),
    st.booleans(),
)
def test_lines_are_read_alike_from_a_file_to_pack_and_from_tars(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], mark: bool
) -> None:
    """Python's universal newlines and its `utf-8-sig` say what the lines are."""
    folder = tmp_path_factory.mktemp("text")
    start = "\ufeff" if mark else ""
    whole = folder / "lines.txt"
    whole.write_bytes((start + "".join(line + (end or "\n") for line, end in lines)).encode())
    with whole.open(encoding="utf-8-sig", newline=None) as file:
        expected = [line.removesuffix("\n") for line in file]
    expected = [line for line in expected if line.encode().strip()]
    if not expected:
        return
    source = open_lines(whole)
    assert [source.read(slot).decode() for slot in source.slots] == expected
    vocabularies = []
    for name, texts in (
        ("plain", expected),
        ("ended", [start + line + end for line, end in lines if line.encode().strip()]),
    ):
        members = {f"{number}.txt": text.encode() for number, text in enumerate(texts)}
        write_tar(folder / f"{name}.tar", members)
        index = build_index(str(folder / f"{name}.tar"))
        vocabularies.append(index.vocabulary)
        settings = config("text", length=64, max_failure_rate=0)
        found = decode_lines(read_samples(settings, index, np.arange(len(texts))).data.numpy(), index.vocabulary)
        known = set(index.vocabulary or ()) - {UNKNOWN}
        assert found == [
            "".join(character if character in known else UNKNOWN for character in line[:64]).rstrip(PAD)
            for line in expected
        ]
    assert vocabularies[0] == vocabularies[1]
