"""Write checkpoints from background threads while training goes on; `directory` describes what is on disk.

Each rank writes its part of the tensors. The threads of all ranks go through the same stages, and a stage begins when
all ranks have ended the one before: rank 0 makes the temporary directory, all ranks write their files, rank 0 publishes
the directory. If a stage fails on any rank, or a rank is lost, nothing is published.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distgan.checkpoint import layout
from distgan.checkpoint.directory import (
    Best,
    FileEntry,
    Manifest,
    directory_name,
    prune,
    publish,
    settle_unfinished,
    write_best,
    write_file,
)
from distgan.checkpoint.snapshot import Snapshot
from distgan.checkpoint.uploads import Place, Uploads
from distgan.distributed.control import Control, WorkError
from distgan.distributed.parts import Held, Part, own_part
from distgan.files import disk_errors, reason, sync_folder

logger = logging.getLogger("distgan")

_PATIENCE_SECONDS = 2.0
"""Seconds that a checkpoint waits for the previous one; after that it is skipped."""


class _Report(NamedTuple):
    """What one rank has written."""

    ranges: layout.Ranges
    files: dict[str, FileEntry]


class CheckpointWriter:
    """Writes the checkpoints of a run from a background thread. Create one on every rank.

    The thread copies this rank's part of the tensors to host memory, which is allocated once. Meanwhile the caller may
    do anything that does not change the tensors; `copied` waits for the copy. A checkpoint that blocks the caller is
    written from its own thread, so that it does not wait for an upload. Disk errors and lack of memory are logged and
    counted in `failures`, and training continues. Create the writer before you look for the newest checkpoint: it
    publishes or removes the leftovers of a killed process.

    Args:
        folder: created with the first checkpoint.
        keep: number of newest checkpoints to keep, besides the best one.
        ranks: communication of the thread that calls `save`. Without it, this process writes alone.
        background: communication of the writing threads, on a process group of its own.
        uploads: uploads each checkpoint from the same thread. The folders of ranks on other nodes may then be others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        ranks: Control | None = None,
        background: Control | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        assert keep >= 1
        self._ranks, self._background = ranks or Control(None), background or Control(None)
        self.uploads = uploads
        self._leads = (uploads.place if uploads else Place(self._background.rank, self._background.world_size)).leads
        self.folder = folder
        self.keep = keep
        self.failures = 0
        """Number of checkpoints that could not be written or uploaded."""
        self.last_good: Path | None = None
        """Newest checkpoint that this writer has published; None before the first."""
        self._snapshots: dict[str, Snapshot] = {}
        self._thread: threading.Thread | None = None
        self._on_disk = False
        self._copied, self._settled = threading.Event(), threading.Event()
        self._copied.set()
        self._settled.set()
        self._step: int | None = None
        """Step of the last call of `save`."""
        try:
            if self._leads:
                settle_unfinished(folder)
        except OSError as error:
            logger.warning("%s: cannot remove the leftovers of an interrupted run: %s", folder, reason(error))

    def save(
        self,
        step: int,
        sets: Mapping[str, Mapping[str, Held]],
        state: Mapping[str, Any],
        *,
        blocking: bool = False,
        last: bool = False,
    ) -> bool:
        """Copy the tensors and the state, and write them as the checkpoint of `step`. Collective: call on every rank.

        Args:
            sets: name of the set -> tensor name -> tensor, or this rank's part of it. The names are equal on all ranks.
                Do not change the tensors before `copied` returns.
            state: JSON values; numbers must be finite.
            blocking: wait until the checkpoint is on disk; it may not be uploaded yet. If False, wait at most two
                seconds for a checkpoint that is still being written or uploaded, then skip this one with a warning.
            last: the run ends after it, so uploads of earlier ones are left for its upload.

        Returns:
            True if the writing has started or, with `blocking`, if the checkpoint is on disk. Equal on all ranks.

        Raises:
            ValueError: a number in `state` is not finite.
        """
        if not blocking and self._is_busy():
            if self._ranks.is_main:
                logger.warning(
                    "checkpoint of step %d skipped: the %s is still being %s; raise checkpoint.every, or put run_dir "
                    "on a faster %s",
                    step,
                    self._thread.name if self._thread is not None else "previous checkpoint",
                    *(("uploaded", "store") if self.uploads and self._settled.is_set() else ("written", "disk")),
                )
            return False
        if blocking and step != self._step:
            self._settled.wait()
        else:
            self.wait()
        self._step = step
        document = json.dumps(state, allow_nan=False).encode()
        rank, world_size = self._background.rank, self._background.world_size
        own = {
            name: {key: own_part(held, rank, world_size) for key, held in tensors.items()}
            for name, tensors in sets.items()
        }
        self._on_disk = False
        self._copied.clear()
        self._settled.clear()
        work = partial(self._write_and_upload, step, own, document)
        if blocking:
            written = self._write(step, own, document, self._ranks)
            if last and written and self.uploads is not None:
                self.uploads.last = step
            work = partial(self._upload_after, self._thread, written)
        self._thread = threading.Thread(target=work, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()
        return not blocking or written

    def copied(self) -> None:
        """Wait until the tensors passed to `save` may change again."""
        self._copied.wait()

    def mark_best(self, step: int, value: float, metric: str) -> bool:
        """Mark the checkpoint of `step`, which must be on disk, as the best one. Call it on rank 0 only.

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

    def upload_rest(self, pauses: Sequence[float]) -> bool:
        """Upload what earlier attempts have not, after each of some pauses in seconds. Collective: call on every rank.

        Returns:
            True if nothing is left to upload, or there are no uploads. Equal on all ranks.
        """
        self.wait()
        if self.uploads is None:
            return True
        for pause in pauses:
            if not self.uploads.done:
                time.sleep(pause)
                self._upload()
        return self.uploads.done

    @property
    def last_good_name(self) -> str:
        """Newest checkpoint that this writer has published, for messages."""
        return str(self.last_good or "from an earlier start, if any")

    @property
    def not_uploaded(self) -> tuple[list[int], str]:
        """Return the steps that could not be uploaded, and why, as rank 0 knows it."""
        return (self.uploads.waiting, self.uploads.why) if self.uploads is not None else ([], "")

    def _upload(self) -> None:
        if self.uploads is None:
            return
        try:
            self.uploads.run(self._background)
            self.failures += self.uploads.failed
        except Exception as error:  # no error may end a training run
            if self._ranks.is_main:
                logger.error("%s: upload ended: a rank was lost: %s", self.folder, reason(error)[:200])

    def _is_busy(self) -> bool:
        """Return True if a rank still writes the previous checkpoint after some patience. Equal on all ranks."""
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        return self._ranks.exchange([self._thread is not None and self._thread.is_alive()]).result()[0]

    def _copy(self, sets: Mapping[str, Mapping[str, Part]]) -> layout.Ranges:
        ranges, rank = {}, self._background.rank
        try:
            for gone in self._snapshots.keys() - sets.keys():
                del self._snapshots[gone]
            for name, parts in sets.items():
                own = {key: part.values for key, part in parts.items() if layout.is_written(part, rank)}
                self._snapshots.setdefault(name, Snapshot()).copy(own)
                ranges[name] = {key: (parts[key].start, values.numel()) for key, values in own.items()}
        finally:
            self._copied.set()
        return ranges

    def _write_and_upload(self, step: int, sets: Mapping[str, Mapping[str, Part]], state: bytes) -> None:
        if self._write(step, sets, state, self._background):
            self._upload()

    def _upload_after(self, earlier: threading.Thread | None, written: bool) -> None:
        if earlier is not None:  # the threads of all ranks upload in the same order
            earlier.join()
        if written:
            self._upload()

    def _write(self, step: int, sets: Mapping[str, Mapping[str, Part]], state: bytes, ranks: Control) -> bool:
        try:
            self._write_locally(step, sets, state, ranks)
            return self._on_disk
        finally:
            self._copied.set()  # also if no thread could be started for the copy
            self._settled.set()

    def _write_locally(self, step: int, sets: Mapping[str, Mapping[str, Part]], state: bytes, ranks: Control) -> None:
        path = self.folder / directory_name(step)
        temporary = self.folder / f"{path.name}.tmp"
        try:
            ranges = ranks.run_on_all(lambda: self._begin(temporary, sets))
            files = ranks.run_on_all(lambda: self._write_files(temporary, ranges))
            reports = ranks.gather_on_main(_Report(ranges, files))
            ranks.run_on_all(lambda: self._publish(step, path, temporary, sets, reports, state))
            if self.uploads is not None:
                ranks.run_on_all(lambda: self._adopt(temporary, path))
        except Exception as error:  # no error may end a training run
            if self._on_disk:  # and then another rank was lost
                return
            why = reason(error) if isinstance(error, WorkError) else f"a rank was lost: {reason(error)[:200]}"
            if self._leads:
                shutil.rmtree(temporary, ignore_errors=True)
            tensors = [part for parts in sets.values() for part in parts.values()]
            self._report_failure(step, why, sum(part.shape.numel() * part.values.itemsize for part in tensors))
            return
        else:
            self.last_good, self._on_disk = path, True

    def _begin(self, temporary: Path, sets: Mapping[str, Mapping[str, Part]]) -> layout.Ranges:
        ranges = self._copy(sets)
        if self._leads:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        return ranges

    def _write_files(self, temporary: Path, ranges: layout.Ranges) -> dict[str, FileEntry]:
        number, of = self._background.rank + 1, self._background.world_size
        files = {}
        with disk_errors(self.folder):
            # A network file system may not show the new directory here yet; this asks for it.
            temporary.mkdir(exist_ok=True)
            for name, snapshot in self._snapshots.items():
                if ranges[name]:
                    file = layout.file_name(name, number, of)
                    files[file] = write_file(temporary / file, snapshot.chunks())
            sync_folder(temporary)
        return files

    def _publish(
        self,
        step: int,
        path: Path,
        temporary: Path,
        sets: Mapping[str, Mapping[str, Part]],
        reports: list[_Report],
        state: bytes,
    ) -> None:
        if not self._background.is_main:
            return
        described = layout.make_layout(sets, [report.ranges for report in reports]).model_dump_json().encode()
        files = {name: entry for report in reports for name, entry in report.files.items()}
        with disk_errors(self.folder):
            for name, content in ((layout.FILE, described), ("state.json", state)):
                files[name] = write_file(temporary / name, [content])
            manifest = Manifest(step=step, files=files).model_dump_json(indent=1).encode()
            write_file(temporary / "manifest.json", [manifest])
            sync_folder(temporary)
            publish(temporary, path)
        self.last_good, self._on_disk = path, True
        try:
            prune(self.folder, step, self.keep, self.uploads.under_way if self.uploads else ())
        except OSError as error:
            logger.error("cannot remove old checkpoints from %s: %s", self.folder, reason(error))

    def _adopt(self, temporary: Path, path: Path) -> None:
        """Give the files in another folder than rank 0's their final name too."""
        if self._leads and not self._background.is_main:
            with disk_errors(self.folder):
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)

    def _report_failure(self, step: int, why: str, size: int) -> None:
        self.failures += 1
        if self._ranks.is_main:
            logger.error(
                "%s: checkpoint of step %d failed: %s; it needs %.1f MB; training goes on, last good checkpoint: %s",
                self.folder,
                step,
                why,
                size / 1e6,
                self.last_good_name,
            )
