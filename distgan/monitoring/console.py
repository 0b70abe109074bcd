"""Terminal output of a run: a progress bar on one rank with messages above it, or plain lines without a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from distgan.errors import without_secrets

try:
    from rich.text import Text

    from distgan.monitoring.rich_terminal import Terminal, TrainingBar, command_bar
except ImportError:
    RICH = False
else:
    RICH = True

logger = logging.getLogger("distgan")

_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}
_SHOWN = ("loss/", "fid", "inception_score[", "kid[", "classes[", "modes", "ngram_js")
_REFRESH_SECONDS = 0.25


# Bar and messages share one console, because rich prints above a bar only through the bar's own console. None without
# rich, where plain lines are printed.
terminal = Terminal() if RICH else None


def setup_logging(rank: int) -> None:
    """Show distgan's log: everything on rank 0; warnings and errors, prefixed with the rank, on other ranks."""
    for handler in logger.handlers[:]:
        if isinstance(handler, _Handler):
            logger.removeHandler(handler)
    logger.addHandler(_Handler(rank))
    logger.addFilter(_hide_secrets)  # for the handlers of the user's own program too
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _hide_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


class Console:
    """Show training progress; shows nothing on ranks that are not `main`.

    Args:
        total: number of steps of the whole run.
        start: the step that this process starts from.
    """

    def __init__(self, *, total: int, start: int, main: bool) -> None:
        self._total = total
        self._start = start
        self._main = main
        self._started = time.monotonic()
        self._advanced = -_REFRESH_SECONDS
        self._bar: TrainingBar | None = None
        if main and terminal is not None and terminal.is_terminal and not terminal.is_dumb_terminal:
            self._bar = TrainingBar(terminal, total, start)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to a step; cheap enough for every step."""
        if self._bar is not None and time.monotonic() - self._advanced >= _REFRESH_SECONDS:
            self._advanced = time.monotonic()
            self._bar.show(step)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show those losses, metrics and speeds that the row has."""
        if not self._main:
            return
        shown = _summary(values)
        if self._bar is not None:
            self._bar.show(step, values=shown)
            return
        remaining = (time.monotonic() - self._started) * (self._total - step) / max(1, step - self._start)
        eta = timedelta(seconds=round(remaining)) if step > self._start else "unknown"
        logger.info("step %d/%d  eta %s  %s", step, self._total, eta, shown)

    def close(self) -> None:
        """Stop updating the bar and release the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar for a command on a terminal, nothing elsewhere. Yields `progress(done, total)`."""
    if terminal is None:
        yield lambda done, total: None
        return
    with command_bar(terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(values: Mapping[str, float]) -> str:
    parts = [f"{tag.removeprefix('loss/')} {value:.4g}" for tag, value in values.items() if tag.startswith(_SHOWN)]
    if "speed/images_per_second" in values:
        parts.append(f"{values['speed/images_per_second']:,.0f} img/s")
    if values.get("speed/step_seconds"):
        parts.append(f"{1 / values['speed/step_seconds']:.3g} step/s")
    return "  ".join(parts)


class _Handler(logging.Handler):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self._prefix = f"rank {rank}: " if rank else ""
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            line = f"{moment} {self._prefix}{level}{self.format(record)}"
            if terminal is None:
                print(line, file=sys.stderr, flush=True)
                return
            terminal.print(Text(line, style=_STYLES.get(record.levelno, "")), soft_wrap=True)
            terminal.file.flush()
        except BrokenPipeError:
            pass  # the reader of the messages has exited; keep running, as with rich
        except Exception:
            self.handleError(record)
