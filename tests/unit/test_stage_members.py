"""Data stages: which members of which tars they see, and what WebDataset may not do with them."""

from __future__ import annotations

import io
import pickle
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from distgan.cli import main
from distgan.config.signatures import schema_of
from distgan.data.index.build import index_shards
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.data.reader import read_samples
from tests.shards import build_index, numbered_png, refusal, write_tar
from tests.stages import SIDE, batches, settings, write_scans

HERE = __name__


@pytest.fixture(autouse=True)
def _lab(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = str(Path(__file__).parents[1] / "plugins")
    monkeypatch.syspath_prepend(plugins)
    monkeypatch.setenv("PYTHONPATH", plugins)  # of data loader workers


def decoded() -> list[Any]:
    return [wds.decode("rgb8"), wds.to_tuple("png")]


def seen(**_: Any) -> list[Any]:
    def stage(samples: Iterator[Any]) -> Iterator[Any]:
        for sample in samples:
            names = sorted(name for name in sample if not name.startswith("__"))
            yield np.zeros((SIDE, SIDE), np.uint8), names, sample["__key__"]

    return [stage]


def names_seen(index: Index, *declared: str) -> list[list[str]]:
    seen.members = declared  # type: ignore[attr-defined]
    try:
        schema_of.cache_clear()
        return [others[0] for others in read_samples(settings(f"{HERE}:seen"), index, range(len(index))).others]
    finally:
        schema_of.cache_clear()
        del seen.members  # type: ignore[attr-defined]


def test_stages_see_only_declared_members_of_their_own_sample(tmp_path: Path) -> None:
    image = numbered_png(1)
    members = {
        "a.png": image, "a.seg.png": b"mask", "a.json": b"{}", "a.pyd": b"code",
        "a.b.png": b"of a, as WebDataset splits names", "ab.png": image, "ab.json": b"{}", "ab.seg.png": b"mask",
        "c.PNG": image, "c.seg.png": b"mask", "c.json": b"{}",
    }  # fmt: skip
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(format)
        long = {f"{'x' * 120}/{name}": data for name, data in members.items()}
        write_tar(folder / "a.tar", members if format == tarfile.USTAR_FORMAT else long, format)
        index = build_index(str(folder))
        assert names_seen(index, "png", "seg.png") == [["png", "seg.png"]] * 3
        assert names_seen(index, "json", "jpg;png") == [["json", "png"]] * 3
        assert names_seen(index) == [["png"]] * 3


def test_members_that_are_not_together_are_noted(tmp_path: Path) -> None:
    image = numbered_png(1)
    write_tar(
        tmp_path / "a.tar",
        [("a.png", image), ("b.png", image), ("a.txt", b"late"), ("a.json", b"{}"), ("b.txt", b"late")],
    )
    built = index_shards(str(tmp_path))
    assert any("members of 2 samples (such as 'a' in" in note and "sorted by name" in note for note in built.notes)
    assert [built.index.span(sample)[1] for sample in range(2)] == [512 + 512] * 2, "the image alone"
    said = refusal(lambda: names_seen(built.index, "png", "txt"))
    assert "has no member .txt beside .png" in said


def test_members_without_a_key_do_not_part_a_sample(tmp_path: Path) -> None:
    """As macOS's tar writes them before each file; WebDataset passes over them too."""
    image = numbered_png(1)
    members: dict[str, bytes] = {}
    for key in "ab":
        members |= {f"._{key}.png": b"x", f"{key}.png": image, "README": b"x", f"._{key}.txt": b"x", f"{key}.txt": b"t"}
    write_tar(tmp_path / "a.tar", [(name, data) for name, data in members.items()])
    built = index_shards(str(tmp_path))
    assert not any("next to each other" in note for note in built.notes)
    assert names_seen(built.index, "png", "txt") == [["png", "txt"]] * 2


def test_a_tar_that_changed_after_indexing_is_noticed(tmp_path: Path) -> None:
    index = write_scans(tmp_path, 30)
    path = Path(index.shards[0].url)
    content = bytearray(path.read_bytes())
    start, _ = index.span(4)
    content[start : start + 20] = b"z" * 20
    path.write_bytes(content)
    [failure] = read_samples(settings("lab.data:stages", max_failure_rate=1.0), index, range(30)).failures
    assert failure.sample == 4
    assert "run `distgan index` again" in failure.reason


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def unpickling() -> list[Any]:
    return [wds.decode(), wds.map(lambda sample: np.zeros((SIDE, SIDE), np.uint8))]


unpickling.members = "png", "pyd"  # type: ignore[attr-defined]


def shell() -> list[Any]:
    def run(sample: dict[str, Any]) -> Any:
        return wds.gopen(f"pipe:touch {sample['txt'].decode()}").read()

    return [wds.map(run)]


shell.members = "png", "txt"  # type: ignore[attr-defined]


@pytest.mark.parametrize("stages", ["unpickling", "shell"])
def test_webdataset_runs_nothing_that_data_names(tmp_path: Path, stages: str) -> None:
    marker = tmp_path / "marker"
    members = {
        f"{number}.{extension}": data
        for number in range(3)
        for extension, data in (
            ("png", numbered_png(number)), ("pyd", pickle.dumps(Evil(marker))), ("txt", str(marker).encode())
        )
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    said = refusal(lambda: batches(1, build_index(str(tmp_path)), settings(f"{HERE}:{stages}")))
    assert "cannot be read either" in said
    assert "safe" in said or "security" in said.lower(), said
    assert not marker.exists()


def test_a_hard_link_has_no_members_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(numbered_png(1))
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    subprocess.run(["tar", "-C", str(tmp_path), "-cf", str(tmp_path / "t.tar"), "a.png", "b.png"], check=True)
    index = build_index(str(tmp_path / "t.tar"))
    [failure] = read_samples(settings(f"{HERE}:decoded", max_failure_rate=1.0), index, [0, 1]).failures
    assert (failure.sample, failure.replacement) == (1, 0)
    assert "no member .png" in failure.reason


def test_a_sample_larger_than_allowed_is_unreadable(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": numbered_png(1), "a.txt": b"x" * 5000, "b.png": numbered_png(2)})
    index = build_index(str(tmp_path))
    [failure] = read_samples(settings(f"{HERE}:decoded", max_bytes=4000, max_failure_rate=1.0), index, [0, 1]).failures
    assert (failure.sample, failure.replacement) == (0, 1)
    assert "data.max_bytes=4,000" in failure.reason


def scanned() -> list[Any]:
    return [wds.map(lambda sample: Image.open(io.BytesIO(sample.get("tif", sample.get("tiff")))))]


def test_other_files_are_samples_if_they_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {}
    for number in range(9):
        file = io.BytesIO()
        Image.new("L", (SIDE, SIDE), 20 * number).save(file, "TIFF")
        members[f"{number}.cls"] = str(number % 3).encode()
        members[f"{number}.{'tif' if number % 2 else 'TIFF'}"] = file.getvalue()
    write_tar(tmp_path / "a.tar", members)
    assert "found no sample" in refusal(build_index, str(tmp_path))
    main(["index", str(tmp_path), "--extension", "tif;tiff"])
    assert "9 samples of 3 classes" in capsys.readouterr().out
    index = load_index(str(tmp_path))
    assert "set data.stages" in refusal(lambda: read_samples(settings(None), index, range(9)))
    assert "members" in refusal(lambda: read_samples(settings(f"{HERE}:scanned"), index, range(9)))
    scanned.members = ("tif;tiff",)  # type: ignore[attr-defined]
    schema_of.cache_clear()
    batch = read_samples(settings(f"{HERE}:scanned"), index, range(9))
    assert batch.data[:, 0, 0, 0].tolist() == [20 * number for number in range(9)]
    assert batch.labels.tolist() == [number % 3 for number in range(9)]
    for wrong in ("", "cls", "tif;;png"):
        assert "--extension" in refusal(lambda wrong=wrong: build_index(str(tmp_path), extension=wrong))
