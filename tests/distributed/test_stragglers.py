"""A slow rank is named, although all ranks take equally long for a step."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch

from distgan.config import load_config
from distgan.distributed.runtime import Runtime
from distgan.training import inputs
from distgan.training.loop import train
from distgan.training.stragglers import StragglerMonitor
from tests.ranks import RankPool
from tests.runs import recipe, rows, tensors


def train_with_a_slow_rank(config: str, slow: int, where: str) -> list[str]:
    """Train, with one rank sleeping in its data or in its forward passes; what was logged on rank 0."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distgan").addHandler(handler)
    patch = pytest.MonkeyPatch()
    if int(os.environ["RANK"]) == slow:
        if where == "data":
            original = inputs.to_network
            patch.setattr(inputs, "to_network", lambda *samples: (time.sleep(0.2), original(*samples))[1])
        else:
            forward = torch.nn.Conv2d.forward
            patch.setattr(torch.nn.Conv2d, "forward", lambda *a: (time.sleep(0.05), forward(*a))[1])
    try:
        train(load_config(config))
    finally:
        patch.undo()
        logging.getLogger("distgan").removeHandler(handler)
    return said


@pytest.mark.parametrize(("slow", "where"), [(1, "data"), (0, "network")])
def test_the_slow_rank_is_named(tmp_path: Path, digits: Path, ranks: RankPool, slow: int, where: str) -> None:
    config = recipe(tmp_path, digits, training={"steps": 4, "batch_size": 16}, monitoring={"every": 1})
    said = ranks.run(2, train_with_a_slow_rank, str(config), slow, where)[0]
    for row in rows(tmp_path / "run"):
        assert row["ranks/slowest"] == slow
        # The others' waiting is not theirs, although the whole step takes as long for them.
        assert row["ranks/own_step_seconds_max"] >= row["ranks/own_step_seconds_min"] + 0.1
        assert row["ranks/own_step_seconds_min"] < row["speed/step_seconds"] - 0.05
    assert len([line for line in said if line.startswith(f"rank {slow} on ")]) == 1


def test_watching_changes_no_bit(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    for every in (1, 100):
        changed = tmp_path / f"every-{every}"
        changed.mkdir()
        path = recipe(changed, digits, training={"steps": 4}, monitoring={"every": every}, checkpoint={"every": 4})
        ranks.run(2, train_alone, str(path))
    watched, not_watched = tensors(tmp_path / "every-1" / "run", 4), tensors(tmp_path / "every-100" / "run", 4)
    assert all(torch.equal(watched[name], not_watched[name]) for name in watched)


def train_alone(config: str) -> None:
    train(load_config(config))


def test_alone_there_is_nothing_to_wait_for() -> None:
    pace = StragglerMonitor(Runtime(), [torch.nn.Linear(2, 2)])
    pace.begin()
    pace.end()
    assert pace.measure() == {}
