"""Sources of text and points, and their packing: what is a sample, what is held out, and what is refused."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import DataConfig
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.data.kinds.text import PAD, UNKNOWN, decode_lines
from distgan.data.packing.pack import pack
from distgan.data.packing.sources import arrays, prose
from distgan.data.packing.sources.opening import open_source
from distgan.data.reader import read_samples
from distgan.errors import UserError
from tests.shards import refusal
from tests.sources import digests


def write_text(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def lines_of(folder: Path, length: int = 100) -> list[str]:
    index = load_index(str(folder))
    batch = read_samples(DataConfig(path="unused", kind="text", length=length), index, range(len(index)))
    assert batch.failures == []
    assert index.vocabulary is not None
    return decode_lines(batch.data.numpy(), index.vocabulary)


def points_of(index: Index, dimensions: int = 2) -> np.ndarray:
    config = DataConfig(path="unused", kind="points", dimensions=dimensions)
    return read_samples(config, index, range(len(index))).data.numpy()


# Text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_each_line_that_is_not_blank_is_a_sample(tmp_path: Path, end: str, mark: str) -> None:
    path = write_text(tmp_path / "a.txt", [mark + "first", "", "  second: naïve", " \t", "third"], end)
    path.write_bytes(path.read_bytes() + b"without an end")
    source = open_source(path)
    assert [source.read(slot).decode() for slot in source.slots] == [
        "first",
        "  second: naïve",
        "third",
        "without an end",
    ]
    assert list(source.names) == ["a.txt:1", "a.txt:3", "a.txt:5", "a.txt:6"]
    assert source.notes == ("left out 2 blank lines",)
    (said,) = open_source(write_text(tmp_path / "b.txt", ["`a`", "b", "c`"])).notes
    assert said.startswith("2 lines hold a `")


def test_packed_lines_come_back_in_a_random_order(tmp_path: Path) -> None:
    lines = [f"line number {i}" for i in range(40)] + ["twice", "twice"]
    source = write_text(tmp_path / "a.txt", lines)
    report = pack(source, tmp_path / "out", shard_size=15, workers=1)
    assert (report.samples, report.shards, report.num_classes, report.held_out) == (42, 3, 0, 0)
    found = lines_of(tmp_path / "out")
    assert found != lines
    assert sorted(found) == sorted(lines)
    pack(source, tmp_path / "plain", shuffle=False, workers=1)
    assert lines_of(tmp_path / "plain") == lines


def test_held_out_lines_are_in_no_training_shard(tmp_path: Path) -> None:
    lines = [f"line {i % 300}" for i in range(600)]
    source = write_text(tmp_path / "a.txt", lines)
    report = pack(source, tmp_path / "out", held_out=0.2, seed=3, workers=1)
    training, held_out = lines_of(tmp_path / "out"), lines_of(tmp_path / "out" / "held-out")
    assert (len(training), len(held_out)) == (report.samples, report.held_out)
    assert sorted(training + held_out) == sorted(lines)
    assert not set(training) & set(held_out)
    assert abs(len(held_out) / 600 - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 300)
    index = load_index(str(tmp_path / "out"))
    assert len(index) == len(training)
    assert index.vocabulary is not None
    assert set(index.vocabulary) == {UNKNOWN, PAD, *"".join(training)}

    pack(source, tmp_path / "other", held_out=0.2, seed=4, workers=1)
    assert set(lines_of(tmp_path / "other" / "held-out")) != set(held_out)
    write_text(source, [*lines[::-1], "one more"])  # where a line stands does not matter
    pack(source, tmp_path / "more", held_out=0.2, seed=3, workers=1)
    assert set(lines_of(tmp_path / "more" / "held-out")) - {"one more"} == set(held_out)


def test_the_share_that_is_held_out_is_uniform(tmp_path: Path) -> None:
    """For any share, a line is held out if it is for a smaller one."""
    source = write_text(tmp_path / "a.txt", [f"line {i}" for i in range(500)])
    before: set[str] = set()
    for share in (0.05, 0.5, 0.95):
        pack(source, tmp_path / str(share), held_out=share, workers=1)
        held_out = set(lines_of(tmp_path / str(share) / "held-out"))
        assert before < held_out
        assert abs(len(held_out) / 500 - share) < 4 * np.sqrt(share * (1 - share) / 500)
        before = held_out


def test_bytes_do_not_depend_on_workers(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", [f"line {i}" for i in range(200)])
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(300, 3)))
    for workers in (1, 2):
        pack(source, tmp_path / f"t{workers}", held_out=0.3, shard_size=70, workers=workers)
        pack(tmp_path / "a.npy", tmp_path / f"p{workers}", shard_size=70, workers=workers)
    assert digests(tmp_path / "t1" / "held-out") == digests(tmp_path / "t2" / "held-out")
    assert digests(tmp_path / "p1") == digests(tmp_path / "p2")


def test_overwriting_takes_the_held_out_lines_along(tmp_path: Path) -> None:
    source, out = write_text(tmp_path / "a.txt", [f"line {i}" for i in range(50)]), tmp_path / "out"
    pack(source, out, held_out=0.5, workers=1)
    pack(source, out, workers=1, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["index.safetensors", "shard-000000.tar"]
    pack(source, out, held_out=0.5, workers=1, overwrite=True)
    (out / "held-out" / "notes").write_text("mine")
    assert "found notes, which pack did not write" in refusal(lambda: pack(source, out, workers=1, overwrite=True))


def test_a_line_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\ncaf\xe9\nfine\n")
    said = refusal(lambda: pack(tmp_path / "a.txt", tmp_path / "out", workers=1))
    assert said.startswith("a.txt:2: is not UTF-8")
    report = pack(tmp_path / "a.txt", tmp_path / "out", workers=1, on_error="skip")
    assert (report.samples, len(report.skipped)) == (2, 1)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "it is empty"),
        (b"\n  \n", {}, "only blank lines"),
        (b"a\nb\n", {"resolution": 32}, "resolution, format: "),
        (b"a\nb\n", {"image_format": "png"}, "resolution, format: "),
        (b"a\nb\n", {"held_out": 1.0}, "from 0 to below 1"),
        (b"a\nb\n", {"held_out": float("nan")}, "from 0 to below 1"),
        (b"a\na\n", {"held_out": 0.5}, "2 of 2 lines"),
    ],
)
def test_text_that_cannot_be_packed(tmp_path: Path, content: bytes, options: dict, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert message in refusal(lambda: pack(tmp_path / "a.txt", tmp_path / "out", workers=1, **options))
    assert not (tmp_path / "out").exists()


def test_built_in_text_is_prose(tmp_path: Path) -> None:
    lines = prose.python_prose()
    assert len(lines) > 5000
    text = "\n".join(lines)
    assert not re.search(r"[`\"]|\*\w|::=|>>>|[^\S\n ]|  ", text)
    assert sum(len(line) <= prose.WIDTH for line in lines) > 0.99 * len(lines)
    assert sum(character.isalpha() for character in text) > 0.7 * len(text)
    assert sum(word in text for word in ("the object", "is called", "the value")) == 3


def test_markup_is_taken_from_prose() -> None:
    item = 'The *first* item calls “"f()"” and is **bold**, as the user\u2019s own code would be [1].'
    reference = (
        f"Heading\n*******\n\n* {item}\n\n   code = here\n\n"
        f"   Rule ::= that is a line of grammar in many words.\n\nToo short.\n\n{item}"
    )
    assert list(prose.clean([reference])) == ["The first item calls f() and is bold, as the user's own code would be."]
    assert prose.fold("one two " + "x" * 40) == ["one two", "x" * 40]


# Points


def test_rows_of_an_array_are_samples(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3))
    for dtype in ("<f4", ">f8"):
        np.save(tmp_path / "rows.npy", rows.astype(dtype))
        pack(tmp_path / "rows.npy", tmp_path / dtype, shuffle=False, workers=1)
        index = load_index(str(tmp_path / dtype))
        assert (index.kind, index.num_classes) == ("points", 0)
        assert np.array_equal(points_of(index, 3), rows.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"a\.npy: .*float64 of shape \(3,\), "),
        (np.zeros((3, 2), int), "found int64"),
        (np.zeros((0, 2)), r"shape \(0, 2\)"),
        (np.zeros((2, 3), np.float16), "found float16"),
        (np.array([[{}]]), "cannot read the array: .*Python objects"),
        (np.array([[1.0, 2.0], [3.0, np.inf]]), r"a\.npy\[1\]: .*not finite in float32"),
        (np.array([[1.0, 2.0], [3.0, 1e300]]), r"a\.npy\[1\]: .*not finite in float32"),
    ],
)
def test_arrays_that_cannot_be_packed(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        pack(tmp_path / "a.npy", tmp_path / "out", workers=1)


def test_an_array_that_is_cut_short(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((100, 2)))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    assert "a.npy: cannot read the array" in refusal(open_source, tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "centers", "deviation"),
    [
        ("ring", {(round(np.cos(k * np.pi / 4), 6), round(np.sin(k * np.pi / 4), 6)) for k in range(8)}, 0.01),
        ("grid", {(x, y) for x in (-4, -2, 0, 2, 4) for y in (-4, -2, 0, 2, 4)}, 0.05),
    ],
)
def test_built_in_mixtures(tmp_path: Path, name: str, centers: set, deviation: float) -> None:
    """PacGAN's, with chi-squared tests at p = 0.001."""
    count = 5000
    pack(f"builtin:{name}", tmp_path / "out", points=count, workers=1, shuffle=False)
    index = load_index(str(tmp_path / "out"))
    points, labels = points_of(index), index.labels
    assert index.num_classes == len(centers)
    found = np.stack([points[labels == mode].mean(0) for mode in range(len(centers))])
    nearest = {min(centers, key=lambda center, mean=mean: np.hypot(*(mean - center))) for mean in found}
    assert nearest == centers
    exact = np.array(getattr(arrays, name)().centers)[labels]
    squares = ((points - exact) ** 2).sum() / deviation**2  # chi-squared with 2 count degrees of freedom
    assert abs(squares - 2 * count) < 3.3 * np.sqrt(4 * count)
    counts = np.bincount(labels)
    expected = count / len(centers)
    limit = {8: 24.3, 25: 51.2}[len(centers)]
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_a_point_is_a_function_of_seed_and_number() -> None:
    def rows(count: int, seed: int) -> np.ndarray:
        source = open_source("builtin:ring", points=count, seed=seed)
        return np.stack([source.read(slot) for slot in source.slots])

    assert np.array_equal(rows(50, 1)[:20], rows(20, 1))
    assert not np.array_equal(rows(20, 1), rows(20, 2))
    for count in (0, -1, 10**9):
        assert "expected 1 to 10000000" in refusal(lambda count=count: open_source("builtin:ring", points=count))
    for name in ("builtin:digits", "builtin:text", "points.npy"):
        assert "points 5: this option needs builtin:ring or builtin:grid" in refusal(
            lambda name=name: open_source(name, points=5)
        )


def test_held_out_points_are_refused(tmp_path: Path) -> None:
    said = refusal(lambda: pack("builtin:ring", tmp_path / "out", points=10, held_out=0.5, workers=1))
    assert "held-out: this option needs lines of text, found points" in said


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r")), min_size=1, max_size=8))
def test_lines_are_pythons(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    content = "\n".join(lines).encode()
    path = tmp_path_factory.mktemp("text") / f"{hashlib.sha256(content).hexdigest()[:8]}.txt"
    path.write_bytes(content)
    kept = [line.encode() for line in lines if line.encode().strip()]
    if not kept or lines[0].startswith("\ufeff"):
        return
    source = open_source(path)
    assert [source.read(slot) for slot in source.slots] == kept
