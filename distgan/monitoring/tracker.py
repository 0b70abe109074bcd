"""Curves of a run: `metrics.jsonl`, TensorBoard and experiment trackers, with the same numbers.

TensorBoard gets a scalar from its first value that is not zero on. A resumed run drops the rows after the step that it
resumes from, so its curves have no overlap and no gap. A write that fails is logged once per file and counted; it never
ends a run.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from distgan.config import TrackerConfig
from distgan.errors import UserError, without_secrets
from distgan.files import disk_errors, explained, reason, write_atomically
from distgan.monitoring.event_files import EventFile, drop_later_events
from distgan.monitoring.layout import Layout, custom_layout
from distgan.monitoring.trackers import ExperimentTracker
from distgan.packages import is_installed

logger = logging.getLogger("distgan")


class Tracker:
    """Interface of trackers. This one writes nothing: it is the tracker of every rank but the main one."""

    @property
    def failures(self) -> int:
        """Number of writes that failed."""
        return 0

    def scalars(self, step: int, images: int, values: Mapping[str, float]) -> None:
        """Write one row of numbers, with the time in seconds since 1970. A kill after this call does not lose it.

        Args:
            step: at least the step of the row before; if equal, the numbers are added to that row.
            images: real images seen so far; in TensorBoard `progress/kimg`, in thousands.
        """

    def recorded(self, step: int) -> frozenset[str]:
        """Return the names of the numbers in the last row if it is of this step, else nothing."""
        return frozenset()

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Write a picture, uint8 (3, H, W) or (1, H, W)."""

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        """Write a verbatim text. step: None uses the step that this process started from."""

    def hyperparameters(self, values: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Write the settings of this run and the names of the scalars to compare runs by."""

    def close(self) -> None:
        """Close the files."""


def open_tracker(
    run_dir: str | Path,
    *,
    tensorboard: bool,
    resume_step: int | None,
    main: bool,
    trackers: Sequence[TrackerConfig] = (),
    settings: Mapping[str, Any] | None = None,
) -> Tracker:
    """Open the tracker of this rank; only the `main` rank's writes.

    Args:
        run_dir: folder of `metrics.jsonl` and, with `tensorboard` and its package, of `tensorboard/` event files.
        resume_step: step that training continues from; later rows are dropped. None drops all.
        trackers: experiment trackers that get the same rows.
        settings: config of the run by dotted key, for these.

    Raises:
        UserError: an experiment tracker cannot start.
    """
    if not main:
        return Tracker()
    tensorboard = tensorboard and is_installed("tensorboard")
    last_step = -1 if resume_step is None else resume_step
    return _RunTracker(Path(run_dir), trackers, settings or {}, tensorboard=tensorboard, last_step=last_step)


class _RunTracker(Tracker):
    def __init__(
        self,
        run_dir: Path,
        trackers: Iterable[TrackerConfig],
        settings: Mapping[str, Any],
        *,
        tensorboard: bool,
        last_step: int,
    ) -> None:
        self._failures = 0
        self._complained: set[Path] = set()
        self._rows_file, self._events_folder = run_dir / "metrics.jsonl", run_dir / "tensorboard"
        self._rows = _Rows(self._rows_file)
        self._events = _Events(self._events_folder, last_step) if tensorboard else None
        self._first_step = max(0, last_step)
        self._layout: Layout = {}
        kept: list[dict[str, Any]] = []
        self._attempt(self._rows_file, lambda: kept.extend(self._rows.truncate(last_step)))
        if tensorboard:
            self._attempt(self._events_folder, lambda: drop_later_events(self._events_folder, last_step))
        self._experiments: list[ExperimentTracker] = []
        try:
            for tracker in trackers:
                self._experiments.append(ExperimentTracker(tracker, run_dir, settings, kept))
        except UserError:
            self.close()
            raise

    @property
    def failures(self) -> int:
        return self._failures + sum(tracker.failures for tracker in self._experiments)

    def scalars(self, step: int, images: int, values: Mapping[str, float]) -> None:
        numbers = {tag: float(value) for tag, value in values.items()}
        row = {"step": step, "images": images, "time": time.time(), **numbers}
        self._attempt(self._rows_file, lambda: self._rows.append(row))
        for tracker in self._experiments:
            tracker.log(row)
        shown = {"progress/kimg": images / 1000, **numbers}
        self._rows.nonzero.update(tag for tag, value in shown.items() if value != 0)
        layout, failures = custom_layout(self._rows.nonzero), self._failures

        def write(file: EventFile) -> None:
            from torch.utils.tensorboard import summary

            # TensorBoard uses the last layout. Each process writes one at its first row, and again when a chart joins.
            if layout != self._layout:
                file.add(summary.custom_scalars(layout), step)
            for tag, value in shown.items():
                if tag in self._rows.nonzero:
                    file.add(summary.scalar(tag, value), step)

        self._on_tensorboard(write)
        if self._failures == failures:
            self._layout = layout

    def recorded(self, step: int) -> frozenset[str]:
        return frozenset(self._rows.last if self._rows.last.get("step") == step else ())

    def image(self, step: int, tag: str, image: Tensor) -> None:
        def write(file: EventFile) -> None:
            from torch.utils.tensorboard import summary

            file.add(summary.image(tag, image.cpu(), dataformats="CHW"), step)

        self._on_tensorboard(write)

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        indented = "\n".join(f"    {line}" for line in without_secrets(text).splitlines())  # Markdown for verbatim

        def write(file: EventFile) -> None:
            from torch.utils.tensorboard import summary

            file.add(summary.text(tag, indented), self._first_step if step is None else step)

        self._on_tensorboard(write)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Iterable[str]) -> None:
        settings = {key: value if type(value) in (int, float, str) else str(value) for key, value in values.items()}
        names = dict.fromkeys(metrics)

        def write(file: EventFile) -> None:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(settings, names):
                file.add(summary)

        self._on_tensorboard(write)

    def close(self) -> None:
        self._attempt(self._rows_file, self._rows.close)
        if self._events is not None:
            self._attempt(self._events_folder, self._events.close)
        for tracker in self._experiments:
            tracker.close()

    def _on_tensorboard(self, write: Callable[[EventFile], object]) -> None:
        events = self._events
        if events is not None:
            self._attempt(self._events_folder, lambda: events.write(write))

    def _attempt(self, path: Path, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._failures += 1
            if path not in self._complained:
                self._complained.add(path)
                why = reason(explained(error, path))
                logger.error("%s: cannot write: %s; training continues and retries with the next row", path, why)


class _Rows:
    """JSON Lines file with complete lines and increasing steps."""

    def __init__(self, path: Path) -> None:
        self.last: dict[str, Any] = {}
        """The last row."""
        self.nonzero: set[str] = set()
        """Names of the numbers that were not zero in some row."""
        self._path = path
        self._descriptor: int | None = None
        self._end = 0

    def truncate(self, last_step: int) -> list[dict[str, Any]]:
        """Keep the rows up to a step, and return them; remove later ones and a line that a killed process left."""
        if not self._path.exists():
            return []
        kept, dropped = [], False
        with open(self._path, "rb") as file:
            for line in file:
                if _step_of(line) <= last_step:
                    kept.append(line)
                else:
                    dropped = True
        if dropped:
            write_atomically(self._path, b"".join(kept))
        rows = [json.loads(line) for line in kept]
        self.nonzero = {name for row in rows for name, value in row.items() if value != 0}
        self.last = rows[-1] if rows else {}
        return rows

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, or extend the last one if its step is the same."""
        same = self.last.get("step") == row["step"]
        # JSON has no NaN or infinity.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        whole = {**self.last, **finite} if same else finite
        line = json.dumps(whole, allow_nan=False).encode() + b"\n"
        if same:
            self._replace_last(line)
        else:
            self._write(line)
        self.last = whole

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._end = os.fstat(self._descriptor).st_size
        try:
            with disk_errors(self._path):
                written = os.write(self._descriptor, line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)

    def _replace_last(self, line: bytes) -> None:
        self.close()
        with open(self._path, "rb") as file:
            lines = file.readlines()
        write_atomically(self._path, b"".join([*lines[:-1], line]))

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


class _Events:
    """Event files of this process; each write error starts a new file."""

    def __init__(self, folder: Path, last_step: int) -> None:
        self._folder = folder
        # For a server that has already read the later events. It honors the marker only if the first file has it too.
        self._purge_step: int | None = last_step + 1
        self._file: EventFile | None = None

    def write(self, write: Callable[[EventFile], object]) -> None:
        """Write and flush, so that a killed process does not lose the events of a checkpoint's step."""
        try:
            if self._file is None:
                self._file = EventFile(self._folder, purge_step=self._purge_step)
            write(self._file)
            self._file.flush()
        except OSError:
            with suppress(OSError):
                self.close()
            raise
        self._purge_step = None

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def _step_of(line: bytes) -> float:
    """Return the step of a row; infinity for an incomplete row."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        row = None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else math.inf
