"""Long work is left by all ranks before the same piece, and a rank's mistake ends it without a rank left waiting."""

from __future__ import annotations

import time

import pytest

from distgan.distributed.control import Check
from distgan.distributed.runtime import Runtime
from distgan.errors import Interrupted, UserError
from tests.ranks import RankPool

PIECES = (6, 5, 6)


def work(asked_at: int | None, mistaken_at: int | None) -> tuple[str, int]:
    """Pieces of work on each rank, the last of which is asked, or makes a mistake, in one; how it ended, and pieces."""
    runtime = Runtime()
    done = 0

    def asked() -> bool:
        return runtime.rank == runtime.world_size - 1 and done == asked_at

    try:
        with runtime.raise_on_all_ranks(), runtime.interruptible(asked, min(PIECES)) as check:
            for _ in range(PIECES[runtime.rank]):
                check()
                if runtime.rank == runtime.world_size - 1 and done == mistaken_at:
                    raise UserError("a mistake")
                done += 1
    except Interrupted:
        return "interrupted", done
    except UserError as error:
        return str(error), done
    return "done", done


def test_left_together_one_piece_after_being_asked(ranks: RankPool) -> None:
    assert ranks.run(3, work, None, None) == [("done", count) for count in PIECES]
    assert ranks.run(3, work, 2, None) == [("interrupted", 3)] * 3
    assert ranks.run(1, work, 0, None) == [("interrupted", 1)]


def test_a_mistake_of_one_rank_is_all_ranks(ranks: RankPool) -> None:
    assert ranks.run(3, work, None, 1) == [
        ("rank 2: a mistake", 6), ("rank 2: a mistake", 5), ("rank 2: a mistake", 1),
    ]  # fmt: skip


def test_a_mistake_while_being_asked(ranks: RankPool) -> None:
    assert ranks.run(3, work, 1, 1) == [("interrupted", 2), ("interrupted", 2), ("interrupted", 1)]


def endless(check: Check) -> None:
    while True:
        check()
        time.sleep(0.01)


def run_on_main() -> str:
    """Endless work of rank 0, which rank 1 is asked to stop."""
    runtime = Runtime()
    assert runtime.run_on_main(lambda check: check() or "result") == "result"
    with pytest.raises(Interrupted):
        runtime.run_on_main(endless, lambda: runtime.rank == 1)
    return runtime.run_on_main(lambda _: "goes on")


def test_work_of_rank_0_is_left_when_another_is_asked(ranks: RankPool) -> None:
    assert ranks.run(2, run_on_main) == ["goes on"] * 2


def lost_while_main_works() -> str:
    """Endless work of rank 0, which rank 1 does not wait for."""
    runtime = Runtime()
    if runtime.rank == 1:
        return "gone"
    try:
        return str(runtime.run_on_main(endless))
    except RuntimeError as error:
        return "lost contact" if runtime.lost_contact(error) else repr(error)


def test_work_of_rank_0_is_left_when_another_is_lost(ranks: RankPool) -> None:
    assert ranks.run(2, lost_while_main_works) == ["lost contact", "gone"]
