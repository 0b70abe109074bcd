"""The standard output, where the results of commands go."""

from __future__ import annotations

import os
import sys

from distgan.errors import without_secrets


class OutputError(Exception):
    """The standard output cannot be written."""


def write_line(text: object) -> None:
    """A line of a command's result."""
    try:
        print(without_secrets(str(text)), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to the standard output: {error.strerror or error}") from None


def discard_output() -> None:
    """Let what is buffered go nowhere, or the interpreter would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
