"""Checkpoints of a run in an object store.

The objects have the names of the files of a run folder (see `directory`). All files of a checkpoint are written before
its manifest, and `latest` after that. A checkpoint that is removed loses its manifest first. One that is written again
gets another folder, `step-00000042-2`, and the highest number counts. Therefore a checkpoint with a manifest, whose
files have the sizes of the manifest, is complete whenever a job is killed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distgan.checkpoint.directory import (
    JSON_LIMIT,
    Best,
    FileEntry,
    Manifest,
    directory_name,
    newest_first,
    parse_record,
    publish,
    verifies,
)
from distgan.data.storage.objects import ObjectFolder
from distgan.data.storage.store_errors import StoreError
from distgan.errors import UserError
from distgan.files import disk_errors, read_bounded

logger = logging.getLogger("distgan")

MANIFEST = "manifest.json"
_FOLDER = "checkpoints"
_NAME = re.compile(r"(step-\d{8,18})(?:-(\d{1,6}))?")
_FILE = re.compile(rf"({_NAME.pattern})/([A-Za-z0-9_][A-Za-z0-9_.-]*)")


_warned: set[str] = set()
"""URLs of damaged checkpoints that this process has warned about."""


class TakenError(StoreError):
    """Another job has taken the run over."""


class CompleteCheckpoint(NamedTuple):
    """A checkpoint of the store that has its manifest."""

    name: str
    """Name of its folder in the store."""
    manifest: bytes
    """Content of manifest.json."""


class RemoteCheckpoints:
    """Checkpoints below the URL of a run. All methods raise StoreError if a request fails."""

    def __init__(self, objects: ObjectFolder) -> None:
        self.objects = objects

    def listing(self) -> dict[str, dict[str, int]]:
        """Return folder -> file -> size in bytes, of complete and other checkpoints. The highest number comes last."""
        found: dict[str, dict[str, int]] = {}
        for name, size in self.objects.names(_FOLDER).items():
            if match := _FILE.fullmatch(name):
                found.setdefault(match[1], {})[match[4]] = size
        return dict(sorted(found.items(), key=lambda item: _order(item[0])))

    def complete(self) -> dict[int, CompleteCheckpoint]:
        """Return all complete checkpoints by their steps, in the order in which a run resumes.

        The newest comes first, and last come those after `latest`, which the run has discarded. Log a warning, once
        per process, for one whose files do not fit its manifest.
        """
        found = {}
        for name, files in self.listing().items():
            content = self.manifest(name) if MANIFEST in files else None
            if content is None:
                continue
            try:
                if not missing_files(self.parse(name, content), files):
                    found[_order(name)[0]] = CompleteCheckpoint(name, content)
                    continue
                why = "its files do not have the sizes in manifest.json"
            except UserError as error:
                why = str(error)
            where = self.objects.location(f"{_FOLDER}/{name}")
            if where not in _warned:
                _warned.add(where)
                logger.warning("skipped a damaged checkpoint: %s: %s", where, why)
        return {step: found[step] for step in newest_first(found, step_of(self.latest()))}

    def latest(self) -> str:
        """Return the folder that `latest` names; empty if there is none."""
        return (self.objects.read(f"{_FOLDER}/latest", 100) or b"").decode(errors="replace").strip()

    def set_latest(self, name: str) -> None:
        """Make a complete checkpoint the latest, by its folder. Later ones then count as discarded."""
        self.objects.write(f"{_FOLDER}/latest", f"{name}\n".encode())

    def manifest(self, name: str) -> bytes | None:
        """Return the content of the manifest in a folder, or None."""
        return self.objects.read(file_name(name, MANIFEST), JSON_LIMIT)

    def best(self) -> Best | None:
        """Return the best checkpoint, or None if none is marked. Raises UserError if best.json is damaged."""
        name = f"{_FOLDER}/best.json"
        content = self.objects.read(name, JSON_LIMIT)
        return None if content is None else parse_record(content, Best, self.objects.location(name))

    def mark_best(self, content: bytes) -> bool:
        """Write best.json. Return False if the checkpoint that it names is not complete yet."""
        step = parse_record(content, Best, "best.json").step
        if step not in self.complete():
            return False
        self.objects.write(f"{_FOLDER}/best.json", content)
        return True

    def forget_best(self) -> None:
        """Remove best.json."""
        self.objects.remove([f"{_FOLDER}/best.json"])

    def fetch(self, found: CompleteCheckpoint, folder: Path) -> Path:
        """Copy a checkpoint into a local folder of checkpoints, unless it is there already. Return its path.

        Raises:
            UserError: a file does not have the size and SHA-256 of the manifest.
            DiskError: the folder cannot be written.
        """
        manifest, path = self.parse(*found), folder / directory_name(_order(found.name)[0])
        temporary = folder / f"{path.name}.tmp"
        if _is_copy(path, found.manifest):
            return path
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, entry in manifest.files.items():
                if _is_file(path / name, entry):
                    os.replace(path / name, temporary / name)
                    continue
                self.objects.download(file_name(found.name, name), temporary / name, entry.bytes)
                if not _is_file(temporary / name, entry):
                    shutil.rmtree(temporary)
                    where = self.objects.location(file_name(found.name, name))
                    raise UserError(f"{where}: damaged: its size or SHA-256 differs from manifest.json")
            (temporary / MANIFEST).write_bytes(found.manifest)
            publish(temporary, path)
        return path

    def set_manifest(self, name: str, content: bytes) -> None:
        """Write the manifest in a folder, whose files must all be there: this makes the checkpoint complete."""
        self.objects.write(file_name(name, MANIFEST), content)

    def put(self, path: Path, folder: str, name: str) -> None:
        """Upload a file of a local checkpoint."""
        self.objects.upload(path / name, file_name(folder, name))

    def prune(
        self, newest: int, keep: int, best: Iterable[int], writable: Callable[[], RemoteCheckpoints] | None = None
    ) -> None:
        """Remove checkpoints and leftovers of killed uploads, except the newest `keep` up to `newest`, and the best.

        What `latest` names stays too.

        Args:
            writable: see `Uploads`; it is called before each request that removes.
        """
        listing, complete = self.listing(), self.complete()
        steps = {*sorted(step for step in complete if step <= newest)[-keep:], newest, *best, step_of(self.latest())}
        old = listing.keys() - {found.name for step, found in complete.items() if step in steps}
        names = [(folder, name) for folder in sorted(old) for name in sorted(listing[folder])]
        # The manifests first. A damaged checkpoint goes too.
        for first in (True, False):
            removed = [file_name(*each) for each in names if (each[1] == MANIFEST) == first]
            if removed:
                (writable() if writable else self).objects.remove(removed)

    def parse(self, name: str, content: bytes) -> Manifest:
        """Return the manifest in a folder from its content. Raises UserError if it is damaged."""
        return parse_record(content, Manifest, self.objects.location(file_name(name, MANIFEST)))


def file_name(folder: str, name: str) -> str:
    """Return the name of an object of a checkpoint."""
    return f"{_FOLDER}/{folder}/{name}"


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint in a folder of this name; None for another name."""
    return _order(name)[0] if _NAME.fullmatch(name) else None


def next_name(step: int, listing: Mapping[str, Mapping[str, int]]) -> str:
    """Return the folder for a new checkpoint of a step: the last one without a manifest, or the one after it."""
    names = [name for name in listing if _order(name)[0] == step]
    if not names:
        return directory_name(step)
    return names[-1] if MANIFEST not in listing[names[-1]] else f"{directory_name(step)}-{_order(names[-1])[1] + 1}"


def _order(name: str) -> tuple[int, int]:
    """Return the step and the number in the name of a folder."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1].removeprefix("step-")), int(match[2] or 1)


def missing_files(manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    """Return the files of a manifest that are not there with its sizes."""
    return [name for name, entry in manifest.files.items() if sizes.get(name) != entry.bytes]


def _is_copy(path: Path, content: bytes) -> bool:
    try:
        return read_bounded(path / MANIFEST, JSON_LIMIT) == content and verifies(path)
    except UserError:
        return False


def _is_file(path: Path, entry: FileEntry) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    with open(path, "rb") as file:
        digest: Any = hashlib.file_digest(file, "sha256")
    return bool(digest.hexdigest() == entry.sha256)
