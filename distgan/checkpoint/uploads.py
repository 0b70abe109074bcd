"""Upload the checkpoints that all ranks have written to their local folders, from the thread that wrote them.

Ranks of different nodes have different folders: each holds the files of its own ranks, and that of rank 0 also layout,
state and manifest. The ranks go through the same stages, as they do when they write a checkpoint: all upload their
files; when all have arrived, rank 0 writes the manifest and then `latest`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from distgan.checkpoint.directory import (
    JSON_LIMIT,
    Manifest,
    directory_name,
    read_best,
    read_manifest,
    steps,
)
from distgan.checkpoint.remote import MANIFEST, RemoteCheckpoints, TakenError, file_name, missing_files, next_name
from distgan.data.storage.store_errors import StoreError
from distgan.distributed.control import Control, WorkError
from distgan.errors import UserError
from distgan.files import read_bounded, reason

logger = logging.getLogger("distgan")


class Place(NamedTuple):
    """This rank among those that see the same local folder."""

    number: int
    of: int

    @property
    def leads(self) -> bool:
        """Return True for the one of these ranks that creates, renames and removes folders."""
        return self.number == 0


class _Upload(NamedTuple):
    """A checkpoint to upload."""

    step: int
    manifest: Manifest
    content: bytes
    """Content of manifest.json."""
    folder: str
    """Name of its folder in the store."""
    same: dict[str, str]
    """Files that an earlier checkpoint of this step has alike -> its folder."""


class Uploads:
    """Uploads what is new in the local folders of checkpoints. Create it on every rank.

    Args:
        folder: local folder of checkpoints.
        writable: returns the same checkpoints for a write before which no other job can take the run over. Raises
            StoreError if that is not certain.
        follow: uploads the curves up to now, before a checkpoint counts as the latest.
    """

    def __init__(
        self,
        remote: RemoteCheckpoints,
        folder: Path,
        place: Place,
        *,
        keep: int,
        writable: Callable[[], RemoteCheckpoints],
        follow: Callable[[], None] = lambda: None,
    ) -> None:
        self.remote, self.place = remote, place
        self.done = False
        """True if the last call of `run` left nothing to upload. Equal on all ranks."""
        self.failed = False
        """True if an error ended the last call of `run`. Equal on all ranks."""
        self.waiting: list[int] = []
        """Steps of local checkpoints that the store does not have, on rank 0."""
        self.under_way: frozenset[int] = frozenset()
        """Steps of the local checkpoints that are being uploaded, on rank 0. Do not remove them."""
        self.last: int | None = None
        """Step of the last checkpoint of the run, once it is in the local folders: other uploads are left for it."""
        self._said = self.why = ""
        """Reason of the last failure."""
        self._folder, self._keep, self._writable, self._follow = folder, keep, writable, follow
        self._sent: dict[str, str] = {}
        """Object -> SHA-256 of what this rank has uploaded and no checkpoint of the store has."""

    def settle(self, ranks: Control) -> None:
        """Remove local checkpoints that no longer have all files, as on another number of nodes. Collective."""
        manifests = {}
        for step in steps(self._folder) if ranks.is_main else []:
            with suppress(UserError):
                manifests[step] = read_manifest(self._folder / directory_name(step))
        manifests = ranks.broadcast_object(manifests)
        here = {
            (step, name)
            for step, manifest in manifests.items()
            for name, entry in manifest.files.items()
            if _has_size(self._folder / directory_name(step) / name, entry.bytes)
        }
        found = set().union(*ranks.gather_objects(here))
        whole = [s for s, manifest in manifests.items() if all((s, name) in found for name in manifest.files)]
        self._remove_local(ranks, lambda: whole)

    def run(self, ranks: Control) -> None:
        """Upload all checkpoints that the store does not have, the newest first. Collective: call on every rank.

        Then remove old checkpoints from the store and uploaded ones from the local folders. An error of the store is
        logged on rank 0, and the next call tries again.
        """
        self.done = self.failed = False
        try:
            self.done = self._upload(ranks)
            self._said = ""
        except WorkError as error:
            self.failed = True
            self.why, waiting = reason(error), ", ".join(map(str, self.waiting))
            said = (
                f"checkpoint of step {waiting} not uploaded: {self.why}; it is in {self._folder}, and the next "
                "checkpoint tries again"
                if waiting
                else f"cannot remove old checkpoints: {self.why}"
            )
            # Once for several attempts, and not if the run ends for another reason.
            if ranks.is_main and said != self._said and not isinstance(error.__cause__, TakenError):
                logger.warning("%s: %s", self.remote.objects.url, said)
            self._said = said
        finally:
            self.under_way = frozenset()

    def _upload(self, ranks: Control) -> bool:
        """Return False if the last checkpoint of the run overtook what was being uploaded."""
        self._remove_local(ranks, lambda: steps(self._folder))
        planned = ranks.run_on_all(lambda: self._plan() if ranks.is_main else ([], []))
        local: list[int]
        uploads: list[_Upload]
        local, uploads = ranks.broadcast_object(planned)
        newest = max(local, default=-1)
        for upload in uploads:
            sent = ranks.run_on_all(lambda upload=upload: self._send(upload, ranks.is_main, newest))  # type: ignore[misc]
            if not all(ranks.gather_objects(sent)):
                return False
            try:
                ranks.run_on_all(lambda upload=upload: self._check(upload, ranks.is_main))  # type: ignore[misc]
            except WorkError:
                self._sent.clear()
                raise
            ranks.run_on_all(lambda upload=upload: self._complete(upload, ranks.is_main, newest))  # type: ignore[misc]
        ranks.run_on_all(lambda: self._prune() if ranks.is_main and uploads else None)
        self._sent.clear()
        self.waiting = []
        self._remove_local(ranks, lambda: self._unseen_or_newest(local))
        return True

    def _unseen_or_newest(self, seen: list[int]) -> list[int]:
        found = steps(self._folder)  # another thread may have written more
        return [step for step in found if step not in seen or step == max(found)]

    def _remove_local(self, ranks: Control, kept: Callable[[], list[int]]) -> None:
        """Remove the local checkpoints of other steps than rank 0 names. Collective."""
        found = steps(self._folder)
        # A checkpoint that another thread has written meanwhile is in the folder of rank 0 before it is in this one.
        ranks.barrier()
        kept_steps = ranks.broadcast_object(kept() if ranks.is_main else None)
        for step in set(found) - set(kept_steps) if self.place.leads else ():
            shutil.rmtree(self._folder / directory_name(step), ignore_errors=True)

    def _plan(self) -> tuple[list[int], list[_Upload]]:
        """Return the steps of the local checkpoints, and what to upload, the newest first. Call it on rank 0 only."""
        local, found = {}, steps(self._folder)
        self.under_way = frozenset(found)
        for step in sorted(found, reverse=True):
            try:
                local[step] = read_manifest(self._folder / directory_name(step))
            except UserError as error:
                logger.warning("not uploaded: %s", error)
        self.waiting = list(local)
        self._writable()
        listing, complete, latest = self.remote.listing(), self.remote.complete(), self.remote.latest()
        plan = []
        for step, manifest in local.items():
            own = read_bounded(self._folder / directory_name(step) / MANIFEST, JSON_LIMIT)
            there = complete.get(step)
            if there is not None and there.manifest == own:
                if step == max(local) and there.name != latest:
                    plan.append(_Upload(step, manifest, own, there.name, dict.fromkeys(manifest.files, there.name)))
                continue
            old = self.remote.parse(*there).files if there is not None else {}
            same = {name: there.name for name, entry in manifest.files.items() if there and old.get(name) == entry}
            plan.append(_Upload(step, manifest, own, next_name(step, listing), same))
        self.waiting = [upload.step for upload in plan]
        return list(local), plan

    def _send(self, upload: _Upload, is_main: bool, newest: int) -> bool:
        """Upload this rank's share of the files in its folder. Rank 0 copies what the store has already.

        Returns:
            False if the rest is left for the last checkpoint of the run.
        """
        path = self._folder / directory_name(upload.step)
        here = sorted(name for name in upload.manifest.files if name not in upload.same and (path / name).is_file())
        for name in here[self.place.number :: self.place.of]:
            if self.last is not None and self.last > newest:
                return False
            key, digest = (f"{upload.folder}/{name}", upload.manifest.files[name].sha256)
            if self._sent.get(key) != digest:
                self.remote.put(path, upload.folder, name)
                self._sent[key] = digest
        for name, folder in upload.same.items() if is_main else ():
            if folder != upload.folder:
                self.remote.objects.copy(file_name(folder, name), file_name(upload.folder, name))
        return True

    def _check(self, upload: _Upload, is_main: bool) -> None:
        lacking = missing_files(upload.manifest, self.remote.listing().get(upload.folder, {})) if is_main else []
        if lacking:
            raise StoreError(f"{len(lacking)} of its files are not in the store, such as {lacking[0]}")

    def _complete(self, upload: _Upload, is_main: bool, newest: int) -> None:
        if not is_main:
            return
        self._writable().set_manifest(upload.folder, upload.content)
        if upload.step == newest:
            self._follow()
            self._writable().set_latest(upload.folder)
        self.waiting.remove(upload.step)

    def _prune(self) -> None:
        """Remove old checkpoints from the store. Call it on rank 0 only."""
        try:
            marks = [read_best(self._folder), self.remote.best()]
        except UserError as error:
            logger.error("all old checkpoints kept, because the best one is unknown: %s", error)
            return
        best = [mark.step for mark in marks if mark is not None]
        self.remote.prune(max(steps(self._folder)), self._keep, best, self._writable)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
