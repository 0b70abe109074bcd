"""The command line: `distgan COMMAND`, or `python -m distgan COMMAND` under a launcher."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from distgan.cli.commands import COMMANDS
from distgan.cli.output import OutputError, discard_output
from distgan.cli.parser import parse
from distgan.distributed.launch import is_first, leave
from distgan.errors import LostRankError, NoAnswerError, UserError, without_secrets
from distgan.extensions import allow

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 2 for a user's mistake, 75 if a run's store does not answer, else 1."""
    options = parse(arguments)
    try:
        allow(*getattr(options, "allow", ()))
        COMMANDS[options.command](options)
    except OutputError as error:
        discard_output()
        print(f"distgan: error: {error}", file=sys.stderr, flush=True)
        leave(1)
    except UserError as error:
        if not error.told and (not error.everywhere or is_first("RANK")):
            print(f"distgan: error: {error}", file=sys.stderr, flush=True)
        leave(75 if isinstance(error, NoAnswerError) else 2)
    except KeyboardInterrupt:
        print("distgan: interrupted", file=sys.stderr, flush=True)
        leave(130)
    except LostRankError as error:
        if not error.told:
            print(f"distgan: error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        leave(1)
    except BrokenPipeError:
        discard_output()
        raise SystemExit(1) from None
    except Exception:
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        leave(1)
