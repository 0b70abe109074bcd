"""The stream: the same data for any number of ranks and loader processes, whatever cannot be read, whoever signals."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from distgan.config import DataConfig
from distgan.data import stream as stream_module
from distgan.data.index.file import INDEX_NAME
from distgan.data.index.table import Index
from distgan.data.order import make_order, trace
from distgan.data.reader import Batch, replacements
from distgan.data.replacements import Failure, Substitutions
from distgan.data.stream import Stream, open_rank_stream
from distgan.errors import UserError
from distgan.randomness import uniform
from tests.shards import build_index, damage, numbered_index, numbers_of, refusal, write_tar

SEED = 11


def config(**changes: Any) -> DataConfig:
    lanes = {"lanes": 4, "shuffle_block": 8} if changes.get("order") == "lanes" else {}
    return DataConfig.model_validate({"path": "unused", "resolution": 8, "num_workers": 0} | lanes | changes)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return numbered_index(tmp_path, [13, 7, 20, 11], classes=5)


@contextmanager
def streaming(*arguments: Any, **options: Any) -> Iterator[Stream]:
    stream = open_rank_stream(*arguments, **({"start": 0, "micro_batch": 12} | options))
    try:
        yield stream
    finally:
        stream.close()


def pixels_by_position(batches: list[Batch]) -> dict[int, bytes]:
    return {
        position: image.numpy().tobytes() + bytes([label])
        for batch in batches
        for position, image, label in zip(batch.positions.tolist(), batch.data, batch.labels.tolist(), strict=True)
    }


def read(count: int, index: Index, settings: DataConfig, **options: Any) -> list[Batch]:
    with streaming(settings, SEED, index, **options) as stream:
        return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("order", ["permutation", "lanes"])
def test_any_number_of_ranks_and_loaders_sees_the_same_batches(index: Index, order: str) -> None:
    damage(index, 17)
    count = 12  # batches of 12: nearly three epochs of 51
    expected = pixels_by_position(read(count, index, config(order=order, mirror=True)))
    assert len(expected) == count * 12
    for workers, world_sizes in ((0, (2, 3, 4, 12)), (1, (1,)), (3, (1, 2))):
        for world_size in world_sizes:
            settings = config(order=order, mirror=True, num_workers=workers)
            ranks = [read(count, index, settings, rank=rank, world_size=world_size) for rank in range(world_size)]
            for of_ranks in zip(*ranks, strict=True):
                assert len({len(batch.labels) for batch in of_ranks}) == 1
            assert pixels_by_position([batch for batches in ranks for batch in batches]) == expected
            for step, of_ranks in enumerate(zip(*ranks, strict=True)):
                positions = sorted(position for batch in of_ranks for position in batch.positions.tolist())
                assert positions == list(range(12 * step, 12 * step + 12))


def test_batches_hold_what_the_order_says(index: Index) -> None:
    batches = read(5, index, config(), start=40)
    order = make_order(config(), SEED, index)
    for step, batch in enumerate(batches):
        positions = np.arange(40 + 12 * step, 52 + 12 * step)
        samples = order.samples(positions).tolist()
        assert batch.positions.tolist() == positions.tolist()
        assert batch.indices.tolist() == samples == numbers_of(batch.data.numpy())
        assert batch.labels.tolist() == [sample % 5 for sample in samples]


def test_trace_tells_what_the_stream_gives(index: Index) -> None:
    (batch,) = read(1, index, config(order="lanes"), start=45, world_size=2, rank=1)
    rows = trace(index, make_order(config(order="lanes"), SEED, index), batch.positions.numpy())
    assert [row["sample"] for row in rows] == batch.indices.tolist()
    assert [row["epoch"] for row in rows] == [position // 51 for position in batch.positions.tolist()]
    firsts = {"000.tar": 0, "001.tar": 13, "002.tar": 20, "003.tar": 40}
    assert [firsts[row["shard"]] + int(row["key"]) for row in rows] == batch.indices.tolist()


def test_mirroring_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    members = {}
    for number in range(51):
        image = np.full((8, 8, 3), number, np.uint8)
        image[:, :3] = 200
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        members[f"{number:03d}.png"] = buffer.getvalue()
    index = build_index(str(write_tar(tmp_path / "a.tar", members)))
    plain = read(9, index, config())
    mirrored = read(9, index, config(mirror=True))
    flips = uniform(SEED, "data/mirror", torch.arange(108)) < 0.5
    for before, after in zip(plain, mirrored, strict=True):
        for position, one, other in zip(before.positions.tolist(), before.data, after.data, strict=True):
            assert torch.equal(other, one.flip(-1) if flips[position] else one)
    assert 30 < int(flips.sum()) < 78


def test_torchs_default_generator_is_left_alone(index: Index) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    read(3, index, config(num_workers=1, mirror=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_known_replacement_is_used_although_the_sample_could_be_read(index: Index, workers: int) -> None:
    substitutions = Substitutions()
    order = make_order(config(), SEED, index)
    place = order.samples(np.arange(51)).tolist()
    late, early, one, other = place[30], place[2], place[40], place[41]
    with streaming(config(num_workers=workers), SEED, index, substitutions=substitutions) as stream:
        first = next(stream)
        assert early in first.indices.tolist()
        time.sleep(0.3 * workers)  # let the loaders read ahead of the news
        substitutions.add(Failure(late, one, "elsewhere"), 12)
        substitutions.add(Failure(early, other, "elsewhere"), 60)
        batches = [next(stream) for _ in range(8)]
    seen = {p: s for batch in batches for p, s in zip(batch.positions.tolist(), batch.indices.tolist(), strict=True)}
    for position, sample in seen.items():
        plain = int(order.samples(np.array([position]))[0])
        replaced = {late: one} | ({early: other} if position >= 60 else {})
        assert sample == replaced.get(plain, plain), position
    for batch in batches:
        assert numbers_of(batch.data.numpy()) == batch.indices.tolist()
        assert batch.labels.tolist() == [sample % 5 for sample in batch.indices.tolist()]
        assert batch.failures == []
    resumed = read(4, index, config(num_workers=workers), substitutions=substitutions, start=60)
    assert pixels_by_position(resumed).items() <= pixels_by_position(batches).items()


def test_failures_are_reported_until_they_are_recorded(index: Index) -> None:
    broken = int(make_order(config(), SEED, index).samples(np.array([3]))[0])
    damage(index, broken)
    stand_in = replacements(SEED, broken, range(51))[0]
    substitutions = Substitutions()
    with streaming(config(), SEED, index, substitutions=substitutions) as stream:
        batch = next(stream)
        assert [(f.sample, f.replacement) for f in batch.failures] == [(broken, stand_in)]
        assert batch.indices[3] == stand_in
        unrecorded = [next(stream) for _ in range(8)]  # into the third epoch
        assert [f.sample for batch in unrecorded for f in batch.failures] == [broken]
        substitutions.add(batch.failures[0], 108)
        recorded = [next(stream) for _ in range(9)]
        assert [f for batch in recorded for f in batch.failures] == []
        assert all(broken not in batch.indices.tolist() for batch in recorded)


def test_what_a_loader_replaced_stays_so_while_other_news_arrives(index: Index) -> None:
    place = make_order(config(), SEED, index).samples(np.arange(51)).tolist()
    broken, other, stand_in = place[15], place[40], replacements(SEED, place[15], range(51))[0]
    shard = Path(index.shards[index.entry(broken)[0]].url)
    intact = shard.read_bytes()
    damage(index, broken)
    substitutions = Substitutions()
    with streaming(config(num_workers=1), SEED, index, substitutions=substitutions) as stream:
        next(stream)
        time.sleep(0.3)  # let the loader read on
        shard.write_bytes(intact)
        substitutions.add(Failure(other, place[41], "elsewhere"), 12)
        batch = next(stream)
    assert batch.indices[3] == stand_in
    assert [failure.sample for failure in batch.failures] == [broken]


def test_a_replacement_that_fails_too_is_replaced_in_turn(index: Index) -> None:
    order = make_order(config(), SEED, index)
    sample, stand_in = order.samples(np.array([5, 40])).tolist()
    damage(index, stand_in)
    substitutions = Substitutions()
    substitutions.add(Failure(sample, stand_in, "recorded by another rank"), 0)
    (batch,) = read(1, index, config(), substitutions=substitutions)
    assert [failure.sample for failure in batch.failures] == [stand_in]
    assert batch.indices[5] == batch.failures[0].replacement == replacements(SEED, stand_in, range(51))[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_user_must_mend_arrives_as_one_line(index: Index, workers: int) -> None:
    for shard in index.shards:
        os.unlink(shard.url)
    with streaming(config(num_workers=workers, retries=0), SEED, index) as stream, pytest.raises(UserError) as error:
        next(stream)
    assert "\n" not in str(error.value)
    assert "other samples" in str(error.value)


def test_an_index_that_changes_while_it_is_in_use(index: Index, tmp_path: Path) -> None:
    """Loaders that start later open it by its path, while the trainer goes on with what it has."""
    with streaming(config(num_workers=1), SEED, index) as stream:
        next(stream)
    numbered_index(tmp_path, [13, 7, 20, 9], classes=5)
    with streaming(config(num_workers=1), SEED, index) as stream:
        assert "changed while it was in use" in refusal(next, stream)
    (tmp_path / INDEX_NAME).unlink()
    with streaming(config(num_workers=1), SEED, index) as stream:
        assert "cannot read the index" in refusal(next, stream)


def test_batches_stay_what_they_were(index: Index) -> None:
    """Loaders write into shared slots; a batch that is kept must not change when they are used again."""
    with streaming(config(num_workers=2, prefetch=1), SEED, index) as stream:
        batches = []
        for step in range(30):
            time.sleep(0.02 if step % 7 == 0 else 0)
            batches.append(next(stream))
    for batch in batches:
        assert numbers_of(batch.data.numpy()) == batch.indices.tolist()


def test_closing_ends_the_loaders(index: Index) -> None:
    stream = open_rank_stream(config(num_workers=2), SEED, index, start=0, micro_batch=12)
    next(stream)
    workers = [psutil.Process(worker.pid) for worker in stream._workers]
    assert len(workers) == 2
    stream.close()
    stream.close()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    with pytest.raises(StopIteration):
        next(stream)


def test_a_loader_that_hangs_is_killed(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_STOP_SECONDS", 0.1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    stream = open_rank_stream(config(num_workers=1), SEED, index, start=0, micro_batch=12)
    next(stream)
    (worker,) = (psutil.Process(worker.pid) for worker in stream._workers)
    worker.suspend()
    stream.close()
    assert psutil.wait_procs([worker], timeout=10)[1] == []


def test_loaders_are_deaf_to_the_trainers_signals(index: Index) -> None:
    with streaming(config(num_workers=2), SEED, index) as stream:
        for _ in range(2):
            next(stream)  # one of each loader, so that both are up
        (server,) = {psutil.Process(worker.pid).ppid() for worker in stream._workers}
        for pid in (server, *(worker.pid for worker in stream._workers)):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(pid, number)
        assert len([next(stream) for _ in range(50)]) == 50
        assert all(worker.is_alive() for worker in stream._workers)


TRAINER = """
import sys, time
from distgan.config import DataConfig
from distgan.data.index.loading import load_index
from distgan.data.stream import open_rank_stream
if __name__ == "__main__":
    index = load_index(sys.argv[1])
    stream = open_rank_stream(DataConfig(path="-", resolution=8, num_workers=2), 0, index, start=0, micro_batch=8)
    next(stream)
    print(*(worker.pid for worker in stream._workers), flush=True)
    if sys.argv[2] == "leave":
        raise RuntimeError("without closing anything")
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["killed", "leave"])
def test_no_loader_outlives_its_trainer(index: Index, tmp_path: Path, end: str) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    folder = os.path.dirname(index.shards[0].url)
    with subprocess.Popen(
        [sys.executable, str(script), folder, end], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as trainer:
        assert trainer.stdout is not None
        workers = []
        for pid in trainer.stdout.readline().split():
            try:
                workers.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        if end == "killed":
            assert len(workers) == 2
            workers.append(psutil.Process(workers[0].ppid()))
            trainer.kill()
        trainer.wait(30)
    assert psutil.wait_procs(workers, timeout=15)[1] == []
