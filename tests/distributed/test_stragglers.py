"""A slow rank is named, although all ranks take equally long for a step."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distgan.config import load_config
from distgan.distributed import collectives
from distgan.distributed.runtime import Runtime
from distgan.monitoring import stragglers
from distgan.monitoring.stragglers import StragglerMonitor
from distgan.training import inputs
from distgan.training.loop import train
from tests.ranks import RankPool
from tests.runs import recipe, rows, tensors

WORK, SLOW_WORK, WAIT = 1.0, 4.0, 1000.0
"""Seconds by the controlled clock: a piece of work on most ranks, on the slow one, and a wait for other ranks."""


@contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distgan").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("distgan").removeHandler(handler)


def interpose(patch: pytest.MonkeyPatch, where: str, pause: Callable[[], None]) -> None:
    """Pause before each batch goes to the networks, or before each convolution."""
    if where == "data":
        convert = inputs.to_network
        patch.setattr(inputs, "to_network", lambda *samples: (pause(), convert(*samples))[1])
    else:
        forward = torch.nn.Conv2d.forward
        patch.setattr(torch.nn.Conv2d, "forward", lambda *a: (pause(), forward(*a))[1])


def train_with_a_slow_rank(config: str, slow: int, where: str) -> list[str]:
    """Train, with one rank sleeping in its data or in its forward passes; what was logged on rank 0."""
    with heard() as said, pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == slow:
            interpose(patch, where, lambda: time.sleep(0.2 if where == "data" else 0.05))
        train(load_config(config))
    return said


def train_by_a_controlled_clock(config: str, slow: int, where: str) -> tuple[list[str], float]:
    """Train by a clock that only work and waits move on; what was logged, and what the clock says in the end."""
    clock = [0.0]

    def pass_by(seconds: float) -> None:
        clock[0] += seconds

    def reduce(total: torch.Tensor) -> None:
        pass_by(WAIT)
        torch.distributed.all_reduce(total)

    work = SLOW_WORK if int(os.environ["RANK"]) == slow else WORK
    # Registered first, so it runs first: the gradients of the others are waited for before each optimizer step.
    hook = register_optimizer_step_pre_hook(lambda *_: pass_by(WAIT))
    with heard() as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stragglers, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        patch.setattr(collectives, "dist", SimpleNamespace(**{**vars(torch.distributed), "all_reduce": reduce}))
        interpose(patch, where, lambda: pass_by(work))
        train(load_config(config))
    hook.remove()
    return said, clock[0]


@pytest.mark.parametrize(("slow", "where"), [(1, "data"), (0, "network")])
def test_the_slow_rank_is_named(tmp_path: Path, digits: Path, ranks: RankPool, slow: int, where: str) -> None:
    config = recipe(tmp_path, digits, training={"steps": 4, "batch_size": 16}, monitoring={"every": 1})
    (said, told), _ = ranks.run(2, train_by_a_controlled_clock, str(config), slow, where)
    assert told > 4 * WAIT
    assert len(rows(tmp_path / "run")) == 4
    for row in rows(tmp_path / "run"):
        assert row["ranks/slowest"] == slow
        # Equally many pieces of work; no wait is anyone's own, although each is longer than all of the work.
        assert WORK <= row["ranks/own_step_seconds_min"] < WAIT / SLOW_WORK
        assert row["ranks/own_step_seconds_max"] == SLOW_WORK / WORK * row["ranks/own_step_seconds_min"]
    [line] = [line for line in said if line.startswith(f"rank {slow} on ")]
    assert "4.0 times the median" in line


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
