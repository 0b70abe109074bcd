"""Experiment trackers such as Weights & Biases and MLflow, by accelerate's classes. metrics.jsonl stays the record.

`trackers/NAME.json` in the run folder keeps the id of the run there and the last row that was logged without a gap. A
resumed run logs the later rows of metrics.jsonl again, under the same id.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from distgan.config import TrackerConfig
from distgan.errors import UserError, printable
from distgan.files import disk_errors, reason, write_atomically
from distgan.packages import is_installed, missing_package

logger = logging.getLogger("distgan")

Result = TypeVar("Result")
Row = Mapping[str, Any]

_CLOSE_SECONDS = 30.0
"""Longest wait for rows that are still to be sent when the run ends."""
_FIXES = {
    "wandb": "run `wandb login` or set WANDB_API_KEY, or set mode: offline",
    "mlflow": "check MLFLOW_TRACKING_URI",
}


def check_installed(trackers: Iterable[TrackerConfig]) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for tracker in trackers:
        if not is_installed(tracker.name):
            raise missing_package("monitoring.trackers", tracker.name, f"remove {tracker.name} from it")


class ExperimentTracker:
    """One tracker with a thread of its own, so that a slow or lost server does not hold training up.

    Args:
        run_dir: run folder, which also gets the tracker's own files if it has any.
        settings: config of the run by dotted key.
        rows: rows of metrics.jsonl up to the step that the run continues from.

    Raises:
        UserError: the tracker cannot start.
    """

    def __init__(self, config: TrackerConfig, run_dir: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
        check_installed([config])
        self.failures = 0
        """Number of rows that could not be logged."""
        self._config, self._run_dir = config, run_dir
        self._file = run_dir / "trackers" / f"{config.name}.json"
        self._id: str | None = None
        self._tracker: Any = None
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        Thread(target=self._run, name=f"tracker {config.name}", daemon=True).start()
        try:
            missing = self._submit(lambda: self._start(settings, rows)).result()
        except Exception as error:
            self._work.put(None)
            fix = _FIXES.get(config.name, "check its options in monitoring.trackers")
            new = f", remove {self._file} to begin a new run there" if self._file.exists() else ""
            raise UserError(
                f"monitoring.trackers: {config.name} cannot start: {_line(error)}; {fix}{new}, or remove "
                f"{config.name} from monitoring.trackers"
            ) from None
        for row in missing:
            self.log(row)

    def log(self, row: Row) -> None:
        """Log a row of metrics.jsonl. It returns at once; a failure is counted, and the first one is logged."""
        self._submit(lambda: self._log(row))

    def close(self) -> None:
        """Send what is left and end the run there, for a limited time."""
        try:
            self._submit(self._tracker.finish).result(_CLOSE_SECONDS)
        except Exception as error:
            logger.error("monitoring.trackers: %s did not finish: %s", self._config.name, _line(error))
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _submit(self, work: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._work.put(run)
        return future

    def _start(self, settings: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
        """Start the run, or go on in the one of the run folder; return the rows that it may lack."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        name, project, known = self._config.name, self._config.project, self._read()
        options, called = dict(self._config.model_extra or {}), self._config.run_name or self._run_dir.resolve().name
        if name == "wandb":
            own = {"id": known.get("id") or secrets.token_hex(4), "resume": "allow", "dir": str(self._run_dir)}
            options = {**own, "name": called, **options}
        elif name == "mlflow":
            options = {"run_id": known.get("id"), "run_name": called, **options}
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = [str(self._run_dir)] if kind.requires_logging_directory else []
        self._tracker = kind(project, *folder, **options)
        self._tracker.start()
        run, last = self._tracker.tracker, (known.get("step", -1), known.get("time"))
        if name == "wandb":
            # Its own step can only grow, but rows come again after a resume: the step is a number of the row instead.
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
            self._id = run.id
            # A killed process may not have sent its last rows.
            if not run.offline and (sent := run.summary.get("step", -1)) < last[0]:
                last = (sent, None)
        elif name == "mlflow":
            self._id = run.info.run_id
        if name != "mlflow" or not known:  # MLflow refuses to change a parameter
            self._tracker.store_init_configuration(dict(settings))
        kept = [row for row in rows if row["step"] < last[0] or (row["step"], row["time"]) == last]
        self._remember(kept[-1] if kept else {"step": -1, "time": None})
        return list(rows[len(kept) :])

    def _log(self, row: Row) -> None:
        step = int(row["step"])
        # null in metrics.jsonl stands for a number that is not finite.
        values = {key: math.nan if row[key] is None else row[key] for key in row.keys() - {"step", "images", "time"}}
        try:
            if self._config.name == "wandb":
                self._tracker.log({"step": step, **values})
            elif self._config.name == "mlflow":
                # Its names have no brackets. With the row's own time, a row that is logged again is the same point.
                named = {re.sub(r"\[(.*?)\]", r".\1", key): value for key, value in values.items()}
                self._tracker.log(named, step=step, timestamp=int(row["time"] * 1000))
            else:
                self._tracker.log(values, step=step)
            if not self.failures:
                self._remember(row)
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                logger.error(
                    "step %d: monitoring.trackers: %s cannot log: %s; training continues, and the next start logs the "
                    "missing rows",
                    step, self._config.name, _line(error),
                )  # fmt: skip

    def _read(self) -> dict[str, Any]:
        """Return what is known of the run there; empty if a new one is to begin."""
        with suppress(OSError, ValueError):
            known = json.loads(self._file.read_bytes())
            if isinstance(known, dict) and known.get("id") and known.get("project") == self._config.project:
                return known
        return {}

    def _remember(self, row: Row) -> None:
        known = {"id": self._id, "project": self._config.project, "step": row["step"], "time": row["time"]}
        with disk_errors(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json.dumps(known).encode(), durable=False)


def _line(error: BaseException) -> str:
    return printable(reason(error))[:300]
