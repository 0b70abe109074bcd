"""Write checkpoints from a background thread while training goes on; `directory` describes what is on disk."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distgan.checkpoint.directory import (
    Best,
    Manifest,
    directory_name,
    prune,
    publish,
    settle_unfinished,
    write_best,
    write_file,
)
from distgan.checkpoint.snapshot import Snapshot, Tensors
from distgan.files import explained, reason, sync_folder

logger = logging.getLogger("distgan")

_PATIENCE_SECONDS = 2.0
"""Seconds that a checkpoint waits for the previous one; after that it is skipped."""


class CheckpointWriter:
    """Writes the checkpoints of a run from a background thread. Create it on rank 0 only.

    The thread copies the tensors to host memory, which is allocated once and holds one checkpoint. Meanwhile the caller
    may do anything that does not change the tensors; `copied` waits for the copy. Disk errors and lack of memory are
    logged and counted in `failures`, and training continues. Create the writer before you look for the newest
    checkpoint: it publishes or removes the leftovers of a killed process.

    Args:
        folder: created with the first checkpoint.
        keep: number of newest checkpoints to keep, besides the best one.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        assert keep >= 1
        self.folder = folder
        self.keep = keep
        self.failures = 0
        """Number of checkpoints that could not be written."""
        self.last_good: Path | None = None
        """Newest checkpoint that this writer has published; None before the first."""
        self._snapshots: dict[str, Snapshot] = {}
        self._thread: threading.Thread | None = None
        self._on_disk = False
        self._copied = threading.Event()
        self._copied.set()
        try:
            settle_unfinished(folder)
        except OSError as error:
            logger.warning("%s: cannot remove the leftovers of an interrupted run: %s", folder, reason(error))

    def save(
        self, step: int, files: Mapping[str, Tensors], state: Mapping[str, Any], *, blocking: bool = False
    ) -> bool:
        """Copy the tensors and the state, and write them as the checkpoint of `step`.

        Args:
            files: file name (without .safetensors) -> tensor name -> tensor. Do not change the tensors before `copied`
                returns.
            state: JSON values; numbers must be finite.
            blocking: wait until the checkpoint is on disk. If False, wait at most two seconds for a checkpoint that is
                still being written, then skip this one with a warning.

        Returns:
            True if the writing has started or, with `blocking`, if the checkpoint is on disk.

        Raises:
            ValueError: a number in `state` is not finite.
        """
        if not blocking and self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        if not blocking and self._thread is not None and self._thread.is_alive():
            logger.warning(
                "checkpoint of step %d skipped: the %s is still being written; "
                "raise checkpoint.every, or put run_dir on a faster disk",
                step,
                self._thread.name,
            )
            return False
        self.wait()
        document = json.dumps(state, allow_nan=False).encode()
        self._on_disk = False
        self._copied.clear()
        name = f"checkpoint of step {step}"
        self._thread = threading.Thread(target=self._write, args=(step, files, document), name=name, daemon=True)
        self._thread.start()
        if blocking:
            self.wait()
        return self._on_disk or not blocking

    def copied(self) -> None:
        """Wait until the tensors passed to `save` may change again."""
        self._copied.wait()

    def mark_best(self, step: int, value: float, metric: str) -> bool:
        """Mark the checkpoint of `step`, which must be on disk, as the best one.

        Returns:
            False, after a warning, if the step has no checkpoint or the mark cannot be written.
        """
        if not (self.folder / directory_name(step)).is_dir():
            logger.warning("no checkpoint of step %d, so it is not marked as the best (%s = %g)", step, metric, value)
            return False
        try:
            write_best(self.folder, Best(step=step, metric=metric, value=value))
        except OSError as error:
            logger.error("cannot mark step %d as the best checkpoint: %s", step, reason(error))
            return False
        return True

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    close = wait

    def _copy(self, files: Mapping[str, Tensors]) -> None:
        try:
            for gone in self._snapshots.keys() - files.keys():
                del self._snapshots[gone]
            for file, tensors in files.items():
                self._snapshots.setdefault(file, Snapshot()).copy(tensors)
        finally:
            self._copied.set()

    def _write(self, step: int, tensors: Mapping[str, Tensors], state: bytes) -> None:
        path = self.folder / directory_name(step)
        temporary = self.folder / f"{path.name}.tmp"
        try:
            self._copy(tensors)
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            contents = {f"{name}.safetensors": snapshot.chunks() for name, snapshot in self._snapshots.items()}
            contents["state.json"] = iter([state])
            files = {name: write_file(temporary / name, chunks) for name, chunks in contents.items()}
            manifest = Manifest(step=step, files=files).model_dump_json(indent=1).encode()
            write_file(temporary / "manifest.json", [manifest])
            sync_folder(temporary)
            publish(temporary, path)
        except Exception as error:  # no error may end a training run
            # Measure the free disk space before the unfinished checkpoint is removed.
            why = explained(error, self.folder) if isinstance(error, OSError) else error
            shutil.rmtree(temporary, ignore_errors=True)
            size = len(state) + sum(tensor.nbytes for file in tensors.values() for tensor in file.values())
            self._report_failure(step, why, size)
            return
        self.last_good = path
        self._on_disk = True
        try:
            prune(self.folder, step, self.keep)
        except OSError as error:
            logger.error("cannot remove old checkpoints from %s: %s", self.folder, reason(error))

    def _report_failure(self, step: int, error: Exception, size: int) -> None:
        self.failures += 1
        logger.error(
            "%s: checkpoint of step %d failed: %s; it needs %.1f MB; training goes on, last good checkpoint: %s",
            self.folder,
            step,
            reason(error),
            size / 1e6,
            self.last_good or "from an earlier start, if any",
        )
