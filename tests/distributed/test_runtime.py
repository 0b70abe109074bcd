"""Several runtimes in one process, one after another, as `train` and then `evaluate` in a notebook make them."""

from __future__ import annotations

import pytest

from distgan.distributed.runtime import Runtime, leave_process_group
from distgan.errors import UserError
from tests.ranks import RankPool


def successive() -> tuple[list[int], list[int]]:
    worlds, ranks = [], []
    for _ in range(3):
        runtime = Runtime()
        worlds.append(runtime.world_size)
        ranks += runtime.gather_objects(runtime.rank)
    return worlds, ranks


def test_a_process_may_work_with_the_others_again(ranks: RankPool) -> None:
    assert ranks.run(2, successive) == [([2, 2, 2], [0, 1] * 3)] * 2


def after_leaving() -> None:
    Runtime()
    leave_process_group()
    with pytest.raises(UserError, match="was one of 2 and has left their process group"):
        Runtime()


def test_who_has_left_is_not_taken_for_a_job_of_one(ranks: RankPool) -> None:
    ranks.run(2, after_leaving)
