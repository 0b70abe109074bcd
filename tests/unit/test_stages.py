"""Data stages: what a user's WebDataset stages make of the members of a sample, for any ranks, workers and faults."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from distgan.cli import main
from distgan.config import DataConfig
from distgan.config.named import schema_of
from distgan.data import Loader
from distgan.data.index.build import build_index, index_shards
from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.data.index.table import Index
from distgan.data.reader import Batch, read_samples
from distgan.data.replacements import Substitutions, record_failures
from distgan.data.stages import stages_key
from distgan.data.stream import open_rank_stream
from tests.shards import numbered_png, numbers_of, refusal, write_tar

HERE = "tests.unit.test_stages"
SEED = 3
SIDE = 8


def scan(number: int) -> np.ndarray:
    """A 16-bit picture of one level that spells the number."""
    return np.full((SIDE, SIDE), 1000 + 900 * number, np.uint16)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def developed(number: int, gamma: float) -> int:
    """What `lab.data:stages` makes of a scan: every third one is a negative."""
    light = (1000 + 900 * number) / 65535
    return round(255 * ((1 - light) if number % 3 == 0 else light) ** gamma)


def write_scans(folder: Path, count: int = 40, without_caption: int | None = None) -> Index:
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / "%03d.tar"), maxcount=15, verbose=0) as writer:
        for number in range(count):
            caption = {} if number == without_caption else {"txt": "a negative" if number % 3 == 0 else "a scan"}
            writer.write({"__key__": f"{number:04d}", "png": png(scan(number)), "cls": number % 5, **caption})
    return build_index(str(folder))


def settings(stages: Any, **changes: Any) -> DataConfig:
    given = {"path": "unused", "resolution": SIDE, "channels": 1, "num_workers": 0, "stages": stages}
    return DataConfig.model_validate(given | changes)


@pytest.fixture(autouse=True)
def _lab(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = str(Path(__file__).parents[1] / "plugins")
    monkeypatch.syspath_prepend(plugins)
    monkeypatch.setenv("PYTHONPATH", plugins)  # of data loader workers


def batches(count: int, index: Index, config: DataConfig, start: int = 0, **options: Any) -> list[Batch]:
    stream = open_rank_stream(config, SEED, index, start=start, micro_batch=12, **options)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def by_position(found: list[Batch]) -> dict[int, bytes]:
    return {
        position: data.numpy().tobytes()
        for batch in found
        for position, data in zip(batch.positions.tolist(), batch.data, strict=True)
    }


def test_images_are_what_the_formula_says(tmp_path: Path) -> None:
    index = write_scans(tmp_path)
    batch = read_samples(settings({"stages": "lab.data:stages", "gamma": 2.0}), index, range(40))
    assert batch.data.shape == (40, 1, SIDE, SIDE)
    assert batch.labels.tolist() == [number % 5 for number in range(40)]
    assert not batch.failures
    for number, image in enumerate(batch.data):
        assert image.unique().tolist() == [developed(number, 2.0)]


def test_a_plain_webdataset_gives_the_same(tmp_path: Path) -> None:
    from lab.data import stages  # type: ignore[import-not-found]

    index = write_scans(tmp_path)
    urls = [shard.url for shard in index.shards]
    plain = list(wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples(), *stages(gamma=1.3)))
    batch = read_samples(settings({"stages": "lab.data:stages", "gamma": 1.3}), index, range(40))
    assert np.array_equal(batch.data[:, 0].numpy(), np.stack(plain))


def test_any_number_of_ranks_and_loaders_draws_the_same(tmp_path: Path) -> None:
    index = write_scans(tmp_path, without_caption=7)

    def config(workers: int) -> DataConfig:
        given = {"stages": "lab.data:stages", "exposure": 0.5}
        return settings(given, num_workers=workers, mirror=True, max_failure_rate=0.1)

    expected = by_position(batches(8, index, config(0)))
    assert len(expected) == 96
    assert len(set(expected.values())) > 60  # another epoch draws other exposures of the 40 scans
    for workers, world_sizes in ((0, (2, 4)), (1, (1,)), (3, (2,))):
        for world_size in world_sizes:
            ranks = [batches(8, index, config(workers), rank=r, world_size=world_size) for r in range(world_size)]
            assert by_position([batch for of_rank in ranks for batch in of_rank]) == expected
    resumed = by_position(batches(3, index, config(2), start=36))
    assert resumed == {position: expected[position] for position in range(36, 72)}


def test_the_trainers_own_random_numbers_are_left_alone(tmp_path: Path) -> None:
    index = write_scans(tmp_path)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    read_samples(settings({"stages": "lab.data:stages", "exposure": 0.5}), index, range(9))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_sample_that_fails_is_replaced_alone(tmp_path: Path) -> None:
    index = write_scans(tmp_path, without_caption=7)
    batch = read_samples(settings("lab.data:stages", max_failure_rate=1.0), index, range(40))
    [failure] = batch.failures
    assert failure.sample == 7
    assert "000.tar:0007" in failure.reason
    assert "no member .txt beside .cls, .png" in failure.reason
    expected = [developed(number, 1.0) for number in range(40)]
    expected[7] = developed(failure.replacement, 1.0)
    assert batch.data[:, 0, 0, 0].tolist() == expected
    assert batch.indices.tolist() == [failure.replacement if number == 7 else number for number in range(40)]


def failing_on_five() -> list[Any]:
    def check(sample: dict[str, Any]) -> Any:
        if sample["__key__"] == "0005":
            raise KeyError("no five\nhere")
        return Image.open(io.BytesIO(sample["png"]))

    return [wds.map(check)]


def dropping_five() -> list[Any]:
    return [wds.select(lambda sample: sample["__key__"] != "0005"), wds.decode("l8"), wds.map(lambda s: s["png"])]


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ("failing_on_five", ["KeyError", "no five", "test_stages.py:"]),
        ("dropping_five", ["returned 0 samples for 1"]),
    ],
)
def test_an_error_of_the_users_code_names_its_sample_and_line(tmp_path: Path, stages: str, parts: list[str]) -> None:
    index = write_scans(tmp_path)
    [failure] = read_samples(settings(f"{HERE}:{stages}", max_failure_rate=1.0), index, range(12)).failures
    assert failure.sample == 5
    assert all(part in failure.reason for part in [f"{HERE}:{stages}", *parts]), failure.reason
    assert "\n" not in failure.reason


def unlucky() -> list[Any]:
    """Fails for a tenth of all draws, and drops another tenth."""

    def crop(sample: dict[str, Any]) -> Any:
        drawn = random.random()
        if drawn < 0.1:
            raise ValueError("unlucky crop")
        return None if drawn < 0.2 else np.full((SIDE, SIDE), int(255 * drawn), np.uint8)

    return [wds.map(crop)]


def test_a_stage_that_fails_for_some_draws_gives_the_same_everywhere(tmp_path: Path) -> None:
    """Whatever else a process has read: which samples fail, and what replaces them, depends on the position alone."""
    index = write_scans(tmp_path)

    def config(workers: int) -> DataConfig:
        return settings(f"{HERE}:unlucky", num_workers=workers, max_failure_rate=1.0)

    whole = batches(20, index, config(0))
    assert {failure.is_lasting for batch in whole for failure in batch.failures} == {False}
    assert len([failure for batch in whole for failure in batch.failures]) > 20
    expected = by_position(whole)
    assert by_position(batches(20, index, config(3))) == expected
    ranks = [batches(20, index, config(1), rank=rank, world_size=2) for rank in range(2)]
    assert by_position([batch for of_rank in ranks for batch in of_rank]) == expected
    later = by_position(batches(5, index, config(0), start=120))
    assert later == {position: expected[position] for position in range(120, 180)}
    recorded = Substitutions()
    record_failures(recorded, [batch.failures for batch in whole], 240, 40, 1.0, main=False)
    assert len(recorded) > 10
    again = batches(20, index, config(0), substitutions=Substitutions.from_json(recorded.to_json(), 40))
    assert by_position(again) == expected


def decoded() -> list[Any]:
    return [wds.decode("rgb8"), wds.to_tuple("png")]


def tensors() -> list[Any]:
    return [wds.decode("torchrgb8"), wds.map(lambda sample: sample["png"])]


def pictures() -> list[Any]:
    return [wds.decode("pil"), wds.map(lambda sample: sample["png"])]


@pytest.mark.parametrize("stages", ["decoded", "tensors", "pictures"])
def test_images_come_in_the_forms_of_webdataset(tmp_path: Path, stages: str) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.png": numbered_png(300 + number) for number in range(9)})
    index = build_index(str(tmp_path))
    batch = read_samples(settings(f"{HERE}:{stages}", channels=3), index, range(9))
    assert numbers_of(batch.data.numpy()) == list(range(300, 309))


@pytest.mark.parametrize("kind", ["wide", "gray"])
def test_images_are_cropped_and_converted_as_those_of_shards(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 33, 3) if kind == "wide" else (11, 9), dtype=np.uint8)
    write_tar(tmp_path / "a.tar", {"a.png": png(pixels)})
    index = build_index(str(tmp_path))
    staged = read_samples(settings(f"{HERE}:decoded", channels=3), index, [0]).data
    assert torch.equal(staged, read_samples(settings(None, channels=3), index, [0]).data)


def lazy() -> list[Any]:
    return [wds.map(lambda sample: Image.open(io.BytesIO(sample["png"])))]


def test_an_image_that_is_decoded_late_is_replaced_if_it_is_damaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = {f"{n}.png": png(rng.integers(0, 256, (64, 64, 3), np.uint8)) for n in range(6)}
    damaged = bytearray(members["2.png"])
    damaged[100:140] = b"\xaa" * 40
    members |= {"2.png": bytes(damaged), "4.png": members["4.png"][:500]}
    write_tar(tmp_path / "a.tar", members)
    index = build_index(str(tmp_path))
    config = settings(f"{HERE}:lazy", channels=3, max_failure_rate=1.0)
    started = time.monotonic()
    failures = read_samples(config, index, range(6)).failures
    assert time.monotonic() - started < 1  # a damaged image is no fault of the disk, whose reads are repeated
    assert [failure.sample for failure in failures] == [2, 4]
    assert all(f"{HERE}:lazy" in failure.reason for failure in failures)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[0] = 255
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    write_tar(tmp_path / "a.tar", {"a.png": buffer.getvalue()})
    index = build_index(str(tmp_path))
    turned = read_samples(settings(f"{HERE}:lazy", channels=3), index, [0]).data
    assert turned[0, 0, -1].min() == 255
    assert torch.equal(turned, read_samples(settings(None, channels=3), index, [0]).data)


def shuffled() -> list[Any]:
    return [wds.shuffle(100, rng=random.Random(0)), *decoded()]


def batched() -> list[Any]:
    return [*decoded(), wds.batched(4)]


def unseeded() -> list[Any]:
    generator = np.random.default_rng()
    return [wds.map(lambda sample: generator.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))]


def remembering() -> list[Any]:
    def stage(samples: Iterator[Any]) -> Iterator[Any]:
        for place, _ in enumerate(samples):
            yield np.full((SIDE, SIDE), place, np.uint8)

    return [stage]


def dicts() -> list[Any]:
    return [wds.decode("rgb8")]


def floats() -> list[Any]:
    return [wds.decode("rgb"), wds.to_tuple("png")]


def real_numbers() -> list[Any]:
    return [wds.map(lambda sample: Image.new("F", (SIDE, SIDE), 0.5))]


def nothing() -> list[Any]:
    return []


def a_stage() -> Any:
    return wds.decode("rgb8")


def refusing() -> list[Any]:
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ("shuffled", ["another value of a sample alone", "shuffles"]),
        ("unseeded", ["another value of a sample alone", "default generators"]),
        ("remembering", ["another value of a sample alone", "remembers"]),
        ("batched", ["uint8 of shape (1, 8, 8, 3)"]),
        ("dicts", ["a dict of png", "wds.to_tuple"]),
        ("floats", ["a.tar:", "float32 of shape (8, 8, 3)", "uint8"]),
        ("real_numbers", ["a.tar:", "mode F", "L or RGB"]),
        ("nothing", ["expected a list of WebDataset stages"]),
        ("a_stage", ["expected a list of WebDataset stages"]),
        ("refusing", ["cannot be made", "ValueError: not today", "test_stages.py:"]),
    ],
)
def test_stages_that_break_the_contract_are_refused(tmp_path: Path, stages: str, parts: list[str]) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.png": numbered_png(number) for number in range(24)})
    index = build_index(str(tmp_path))
    said = refusal(lambda: batches(1, index, settings(f"{HERE}:{stages}")))
    assert all(part in said for part in [f"{HERE}:{stages}", *parts]), said


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
    write_tar(tmp_path / "a.tar", [("a.png", image), ("b.png", image), ("a.txt", b"late"), ("b.txt", b"late")])
    built = index_shards(str(tmp_path))
    assert any("members of 2 samples (such as 'a' in" in note and "sorted by name" in note for note in built.notes)
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


def halves() -> list[Any]:
    return [wds.decode(), wds.map(lambda sample: sample["npy"] / 2)]


def lower() -> list[Any]:
    return [wds.decode(), wds.map(lambda sample: sample["txt"].lower())]


lower.members = ("txt",)  # type: ignore[attr-defined]


def test_points_and_text(tmp_path: Path) -> None:
    points = np.arange(12, dtype=np.float32).reshape(6, 2)
    with wds.TarWriter(str(tmp_path / "points.tar")) as writer:
        for number, point in enumerate(points):
            writer.write({"__key__": str(number), "npy": point})
    config = settings(f"{HERE}:halves", kind="points", resolution=0, channels=3, dimensions=2)
    assert torch.equal(
        read_samples(config, build_index(str(tmp_path / "points.tar")), range(6)).data, torch.from_numpy(points / 2)
    )
    write_tar(tmp_path / "lines.tar", {"a.txt": b"ab", "b.txt": b"ABB"})
    index = build_index(str(tmp_path / "lines.tar"))
    config = settings(f"{HERE}:lower", kind="text", resolution=0, channels=3, length=4)
    assert index.vocabulary is not None
    a, b, pad = (index.vocabulary.index(one) for one in "ab`")
    assert read_samples(config, index, [0, 1]).data.tolist() == [[a, b, pad, pad], [a, b, b, pad]]


def test_the_loader_passes_on_captions_and_continues_from_a_state(tmp_path: Path) -> None:
    write_scans(tmp_path)
    write_index(str(tmp_path))

    def loader(workers: int) -> Loader:
        options: dict[str, Any] = {"resolution": SIDE, "channels": 1, "stages": captioned}
        return Loader(tmp_path, batch_size=8, num_workers=workers, **options)

    def rows(batch: Batch) -> list[tuple[int, int, str]]:
        pixels = batch.data[:, 0, 0, 0].tolist()
        return [(pixel, *others) for pixel, others in zip(pixels, batch.others, strict=True)]

    with loader(0) as one:
        found = [rows(batch) for batch in one]
        assert sorted(row[1] for epoch in found for row in epoch) == list(range(40))
        assert all(caption == ("a negative" if n % 3 == 0 else "a scan") for epoch in found for _, n, caption in epoch)
    with loader(0) as first:
        flow = iter(first)
        assert [rows(next(flow)) for _ in range(2)] == found[:2]
        state = first.state_dict()
    with loader(2) as other:
        other.load_state_dict(state)
        assert [rows(batch) for batch in other] == found[2:]


def captioned() -> list[Any]:
    def make(sample: dict[str, Any]) -> tuple[np.ndarray, int, str]:
        noise = np.full((SIDE, SIDE), torch.randint(0, 256, ()).item(), np.uint8)
        return noise, int(sample["__key__"]), sample["txt"]

    return [wds.decode(only="txt"), wds.map(make)]


captioned.members = "png", "txt"  # type: ignore[attr-defined]


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


def test_cached_statistics_are_told_apart_by_options(tmp_path: Path) -> None:
    keys = [
        stages_key(settings(stages))
        for stages in (None, "lab.data:stages", {"stages": "lab.data:stages", "gamma": 2.0}, f"{HERE}:decoded")
    ]
    assert keys[0] == ()
    assert len(set(keys)) == 4
