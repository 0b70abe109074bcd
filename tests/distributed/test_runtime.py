"""Several runtimes in one process, one after another, as `train` and then `evaluate` in a notebook make them."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distgan.distributed.runtime import Runtime, leave_process_group
from distgan.errors import UserError
from tests.ranks import RankPool


def time_out() -> timedelta:
    """That of collectives over the default group."""
    group = dist.distributed_c10d._get_default_group()
    return group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[no-any-return]


def successive() -> tuple[list[int], list[int], list[timedelta]]:
    worlds, ranks, timeouts = [], [], []
    for minutes in (3.0, 30.0, 5.0):
        runtime = Runtime(timeout_minutes=minutes)
        worlds.append(runtime.world_size)
        ranks += runtime.gather_objects(runtime.rank)
        timeouts.append(time_out())
    return worlds, ranks, timeouts


def test_a_process_may_work_with_the_others_again(ranks: RankPool) -> None:
    """Each time with the time-out that was asked for: the doctor's own must not end the training it tries."""
    expected = [2, 2, 2], [0, 1] * 3, [timedelta(minutes=minutes) for minutes in (3, 30, 5)]
    assert ranks.run(2, successive) == [expected] * 2


def after_leaving() -> None:
    Runtime()
    leave_process_group()
    with pytest.raises(UserError, match="was one of 2 and has left their process group"):
        Runtime()


def test_who_has_left_is_not_taken_for_a_job_of_one(ranks: RankPool) -> None:
    ranks.run(2, after_leaving)
