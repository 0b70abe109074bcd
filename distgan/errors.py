"""Exceptions for expected conditions: bad user input, unreadable samples, lost ranks and stop requests."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Bad input. The message is one line: the key or file, what was found, what is accepted, and the fix.

    The command line prints the message without a traceback and exits with status 2.

    Args:
        everywhere: True if every rank raises this same error. Then only rank 0 prints it.

    Attributes:
        told: True if another rank failed first and prints the reason. Then this rank prints nothing.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(without_secrets(message))
        self.everywhere = everywhere
        self.told = False


class NoAnswerError(UserError):
    """The store of a run cannot be read now. The command line exits with status 75, and scripts try again."""


def printable(text: str) -> str:
    """Return untrusted text with `?` for each character that is not printable, so that it is one line."""
    return "".join(character if character.isprintable() else "?" for character in text)


def without_secrets(text: str) -> str:
    """Return text without the user and password of each URL in it, and without the query of those of HTTP."""
    if "://" not in text:
        return text
    text = _CREDENTIALS.sub("://", text)
    return _QUERY.sub(r"\1", text)


_CREDENTIALS = re.compile(
    # A secret key may have a slash in it. What a message explains is left alone.
    r"://(?!USER:PASSWORD@)(?:[^\s/@\[]*:\S*@|(?<=https://)[^\s/@]*@|(?<=http://)[^\s/@]*@"
    # A text that was cut before the `@` has no number of a port behind the colon.
    r"|[^\s/@:\[]*:(?!\d{1,5}(?!\w)|PORT)[^\s/'\"]+(?=$|['\"\s]))"
)
_QUERY = re.compile(
    # In the URL of an object store, `?` and `#` are of the name.
    r"((?:https?://[^\s?#]*(?=[?#])|://[^\s?#]*(?=\?[\w-]+=)))\S*?(?=[:;,.)'\"\]}]*(?:\s|$))",
    re.I,
)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun, such as `1 shard` or `2 shards`. `plural` defaults to the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


class MicroBatchMemoryError(UserError):
    """Memory ran out in training with a number of micro-batches that the run found itself; the next start takes more.

    Attributes:
        exhausted: that number as `micro_batches`, with the settings for which it was found.
    """

    def __init__(self, message: str, exhausted: dict[str, Any]) -> None:
        super().__init__(message)
        self.exhausted = exhausted


class UnreadableSampleError(ValueError):
    """The bytes of a sample cannot be decoded. The message is one line."""


class LostRankError(RuntimeError):
    """Another rank ended or did not answer within the timeout, so this rank cannot continue.

    Attributes:
        told: True if the other rank ran out of memory and prints so. Then this rank prints nothing.
    """

    told = False


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
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what}: not enough memory: {said}" + (f"; {fix}" if fix else "")) from None


_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed",
    "STATUS_ALLOC_FAILED",
)  # fmt: skip
"""Parts of the out-of-memory messages of torch's allocators, cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception says that memory of the host or the device ran out."""
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
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what}: {described(error)}", everywhere=everywhere) from error


def described(error: BaseException) -> str:
    """Return what a user's code raised in one line: `TYPE: MESSAGE (FILE:LINE)`, with the innermost line of theirs."""
    while not str(error) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause  # libraries wrap errors in some that say nothing
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}{_place(error)}"


def _place(error: BaseException) -> str:
    own = os.path.dirname(__file__) + os.sep
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    # A user's package may be installed too, but what is not installed is surely theirs.
    frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


_LIBRARIES = (*(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "purelib", "platlib")), "<frozen")
"""Where installed code lies."""
