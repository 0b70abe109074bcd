"""Storage that is slow, fails or vanishes under a run of two ranks: it goes on as if not, or says why it stops."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distgan.checkpoint import writer
from distgan.checkpoint.directory import newest_valid
from distgan.config import load_config
from distgan.data.index.loading import load_index
from distgan.training.loop import train
from tests.ranks import Job, RankPool
from tests.runs import differing, recipe, rows, status, tensors, wait_for_rows
from tests.servers import RangeServer, range_server

STEPS = 30


def train_into_a_slow_folder(config: str, seconds: float) -> tuple[int, list[str]]:
    """Train while each file of a checkpoint takes so long; most writers at once, and what was said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distgan").addHandler(handler)
    patch, write, most = pytest.MonkeyPatch(), writer.write_file, 0

    def slow(*arguments: object) -> object:
        nonlocal most
        most = max(most, sum(thread.name.startswith("checkpoint of") for thread in threading.enumerate()))
        time.sleep(seconds)
        return write(*arguments)  # type: ignore[arg-type]

    patch.setattr(writer, "write_file", slow)
    patch.setattr(writer, "_PATIENCE_SECONDS", 0.01)
    try:
        train(load_config(config))
    finally:
        patch.undo()
        logging.getLogger("distgan").removeHandler(handler)
    return most, said


def test_checkpoints_slower_than_their_interval_do_not_pile_up(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    config = recipe(tmp_path, digits, training={"steps": 12}, checkpoint={"every": 1, "keep": 100})
    most, said = ranks.run(2, train_into_a_slow_folder, str(config), 0.2)[0]
    assert most == 1
    skipped = [line for line in said if "still being written" in line]
    assert len(skipped) >= 5
    # The last one is waited for.
    newest = newest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000012"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    assert rows(tmp_path / "run")[-1]["checkpoint/failures"] == 0


def test_the_last_checkpoint_may_take_longer_than_the_time_out(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    config = recipe(tmp_path, digits, training={"steps": 3, "timeout_minutes": 0.1}, checkpoint={"every": 1000})
    ranks.run(2, train_into_a_slow_folder, str(config), 1.5)
    assert newest_valid(tmp_path / "run" / "checkpoints") is not None
    assert status(tmp_path / "run")["outcome"] == "finished"


@pytest.fixture
def server(digits: Path, tmp_path: Path) -> Iterator[RangeServer]:
    shutil.copytree(digits, tmp_path / "store")
    with range_server(tmp_path / "store") as running:
        yield running


def remote_recipe(folder: Path, server: RangeServer, **sections: object) -> Path:
    data = {"path": server.url, "cache_dir": str(folder / "cache"), "order": "lanes", "lanes": 2, "shuffle_block": 64}
    return recipe(folder, Path(server.url), data=data, training={"steps": STEPS}, **sections)


def test_errors_cuts_delays_and_a_lost_cache_change_nothing(tmp_path: Path, server: RangeServer) -> None:
    config = remote_recipe(tmp_path, server)
    data = f"data.path={server.url}"
    undisturbed = tmp_path / "undisturbed"
    assert Job(2, ["train", str(config), data, f"run_dir={undisturbed}"]).wait() == [0, 0]
    shutil.rmtree(tmp_path / "cache")
    server.delay = 0.1
    job = Job(2, ["train", str(config), data], log=tmp_path / "log")
    wait_for_rows(tmp_path / "run", job)
    # Nothing is left to read from, and the store is in trouble.
    server.failures, server.failure = 3, "cut"
    shutil.rmtree(tmp_path / "cache" / "shards", ignore_errors=True)
    assert job.wait() == [0, 0], (tmp_path / "log").read_text()
    assert rows(tmp_path / "run")[-1]["data/replaced_samples"] == 0
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed, STEPS)) == []


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_shard_that_vanishes_stops_the_run_by_its_name(tmp_path: Path, server: RangeServer, when: str) -> None:
    config = remote_recipe(tmp_path, server)
    gone = server.folder / Path(load_index(server.url).shards[1].url).name
    if when == "before":
        gone.unlink()
    job = Job(2, ["train", str(config), "data.retries=1", "training.steps=1000000"], log=tmp_path / "log")
    if when == "meanwhile":
        wait_for_rows(tmp_path / "run", job)
        gone.unlink()
        shutil.rmtree(tmp_path / "cache" / "shards", ignore_errors=True)  # a rank may be writing there
    assert job.wait(120) == [2, 2], (tmp_path / "log").read_text()
    said = next(line for line in (tmp_path / "log").read_text().splitlines() if "distgan: error:" in line)
    assert gone.name in said
    assert "max_failure_rate" in said
    assert status(tmp_path / "run")["outcome"] == "failed"
