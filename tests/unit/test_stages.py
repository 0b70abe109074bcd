"""Data stages: the same samples for any ranks, workers and faults, whatever the stages draw."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from distgan.config import DataConfig
from distgan.data import Loader
from distgan.data.index.rebuild import write_index
from distgan.data.reader import Batch, read_samples
from distgan.data.replacements import Substitutions, record_failures
from distgan.data.stages import stages_key
from tests.stages import SIDE, batches, developed, settings, write_scans

HERE = __name__


@pytest.fixture(autouse=True)
def _lab(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = str(Path(__file__).parents[1] / "plugins")
    monkeypatch.syspath_prepend(plugins)
    monkeypatch.setenv("PYTHONPATH", plugins)  # of data loader workers


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


def test_cached_statistics_are_told_apart_by_options(tmp_path: Path) -> None:
    keys = [
        stages_key(settings(stages))
        for stages in (None, "lab.data:stages", {"stages": "lab.data:stages", "gamma": 2.0}, f"{HERE}:captioned")
    ]
    assert keys[0] == ()
    assert len(set(keys)) == 4
