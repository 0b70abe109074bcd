"""What can go wrong that is not a defect: a mistake of the user's, a bad sample, a lost rank, a request to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line: what was found and where, what is accepted, and the fix.

    The command line prints it without a traceback and exits with status 2.

    Args:
        everywhere: every rank raises this same error, so that printing it on rank 0 is enough.

    Attributes:
        told: another rank failed before this one and prints why, so that this one prints nothing.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        self.told = False


def printable(text: str) -> str:
    """Return a stranger's text as it goes into a message: one line, with ? for each control character."""
    return "".join(character if character.isprintable() else "?" for character in text)


class UnreadableSampleError(ValueError):
    """The bytes of one sample cannot be decoded; the message is one line."""


class LostRankError(RuntimeError):
    """Another rank ended or did not answer in time, so that this one cannot go on. Its own status tells why."""


class Interrupted(Exception):
    """Work was left undone, by all ranks at the same place, because one of them was asked to stop."""


@contextmanager
def within_memory(what: str, fix: str = "") -> Iterator[None]:
    """Turn a lack of memory inside, on the host or a device, into a user error.

    Args:
        what: key, option or file that the memory is for; the message begins with it.
        fix: what to change; the message ends with it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what}: more memory than there is: {said}" + (f"; {fix}" if fix else "")) from None


_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed",
    "STATUS_ALLOC_FAILED",
)  # fmt: skip
"""As torch's allocators, cuBLAS and cuDNN say it."""


@contextmanager
def blaming(place: object) -> Iterator[None]:
    """A user error inside begins with the file or key that is to blame for it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}", everywhere=error.everywhere) from None
