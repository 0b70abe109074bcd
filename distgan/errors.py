"""Exceptions for expected conditions: bad user input, unreadable samples, lost ranks and stop requests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line: the key or file, what was found, what is accepted, and the fix.

    The command line prints the message without a traceback and exits with status 2.

    Args:
        everywhere: True if every rank raises this same error. Then only rank 0 prints it.

    Attributes:
        told: True if another rank failed first and prints the reason. Then this rank prints nothing.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        self.told = False


def printable(text: str) -> str:
    """Return untrusted text with `?` for each character that is not printable, so that it is one line."""
    return "".join(character if character.isprintable() else "?" for character in text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun, such as `1 shard` or `2 shards`. `plural` defaults to the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


class UnreadableSampleError(ValueError):
    """The bytes of a sample cannot be decoded. The message is one line."""


class LostRankError(RuntimeError):
    """Another rank ended or did not answer within the timeout, so this rank cannot continue."""


class Interrupted(Exception):
    """All ranks left their work at the same point, because one of them received a stop request."""


@contextmanager
def within_memory(what: str, fix: str = "") -> Iterator[None]:
    """Context manager that turns out-of-memory errors of the host or a device into a UserError.

    Args:
        what: key, option or file that needs the memory; the message begins with it.
        fix: imperative that ends the message, such as `lower it`; empty for none.

    Raises:
        UserError: the block ran out of memory. Other exceptions pass unchanged.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what}: not enough memory: {said}" + (f"; {fix}" if fix else "")) from None


_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed",
    "STATUS_ALLOC_FAILED",
)  # fmt: skip
"""Parts of the out-of-memory messages of torch's allocators, cuBLAS and cuDNN."""


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


@contextmanager
def blaming(place: object) -> Iterator[None]:
    """Context manager that prefixes the message of a UserError with `place`, the file or key that caused it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}", everywhere=error.everywhere) from None


@contextmanager
def blaming_code(what: str, *, everywhere: bool = False) -> Iterator[None]:
    """Context manager that turns what a user's code raises into a UserError with the file and line that raised it.

    Out-of-memory errors pass unchanged, for `within_memory`.

    Args:
        what: the code and what it did; the message begins with it.
        everywhere: see `UserError`.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises
        if _is_out_of_memory(error):
            raise
        origin: BaseException = error
        while not str(origin) and (cause := origin.__cause__ or origin.__context__) is not None:
            origin = cause  # libraries wrap errors in some that say nothing
        said = " ".join(str(origin).split())[:300]
        raise UserError(f"{what}: {type(origin).__name__}: {said}{_place(origin)}", everywhere=everywhere) from error


def _place(error: BaseException) -> str:
    """Return the innermost line of the user's own code, ` (FILE:LINE)`; empty if there is none."""
    own = os.path.dirname(__file__) + os.sep
    frames = reversed(traceback.extract_tb(error.__traceback__))
    theirs = (frame for frame in frames if "/torch/" not in frame.filename and not frame.filename.startswith(own))
    frame = next(theirs, None)
    return f" ({frame.filename}:{frame.lineno})" if frame is not None else ""
