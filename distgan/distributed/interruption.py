"""Leaving long work together, soon after any rank was asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distgan.errors import Interrupted, UserError

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

Asked = Callable[[], bool]
"""Whether this rank was asked to stop."""
Check = Callable[[], None]
"""To be called between pieces of work: raises `Interrupted`."""


def never() -> bool:
    """For work that nobody can ask to stop."""
    return False


@contextmanager
def interruptible(runtime: Runtime, asked: Asked, rounds: int) -> Iterator[Check]:
    """Work in pieces, of which every rank has at least `rounds`. Every rank enters it alike.

    The yielded check, called before each piece, raises `Interrupted` on all ranks before the same piece, one piece
    after a rank was asked: what they tell each other is read one piece later, so that no piece waits for it.
    """
    told = runtime.exchange([False])
    left = rounds

    def check() -> None:
        nonlocal told, left
        if left > 0:
            left -= 1
            if told.result()[0]:
                raise Interrupted
            told = runtime.exchange([asked()])

    try:
        yield check
    except UserError:
        # The other ranks do not know yet: they go on asking until they are through.
        while left > 0:
            check()
        raise
    finally:
        told.result()
