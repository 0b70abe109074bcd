"""Checkpoints on disk: a directory is complete or does not exist.

    checkpoints/
        step-00000060/      NAME.r-of-W.safetensors, what each rank wrote of each set of tensors; layout.json, see
                            `layout`; state.json; and, written last,
                            manifest.json: {version, step, files: {name: {bytes, sha256}}}
        latest              name of the checkpoint written last
        best.json           {step, metric, value}: a checkpoint that is never pruned

All ranks write a checkpoint as `step-00000042.tmp`. Each file is synced to disk. When all ranks have done so, rank 0
writes the manifest, updates `latest`, and renames the directory; if it is killed in between, the next writer does. If a
run resumes from an earlier step, it discards the later checkpoints: reading prefers checkpoints up to `latest`, and the
next pruning removes the later ones.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distgan.errors import UserError
from distgan.files import publish_folder, read_bounded, temporary_pattern, write_atomically

logger = logging.getLogger("distgan")

JSON_LIMIT = 64 << 20
USE_OLDER = "use an older checkpoint (train: --resume RUN/checkpoints/step-N)"
"""Fix in the error messages about a damaged checkpoint."""
_COMPLETE = re.compile(r"step-(\d{8,18})")
_HALF_WRITTEN = re.compile("|".join(map(temporary_pattern, ("latest", "best.json"))))
_UNFINISHED = re.compile(r"(step-\d{8,18})(\.removed)?\.tmp")


class Record(BaseModel):
    """JSON file of a checkpoint, validated because its source is untrusted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(Record):
    """Size and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


class Manifest(Record):
    """Files of a complete checkpoint. File names have no separators, so that none can leave its directory."""

    version: Literal[1] = 1
    step: int
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)], FileEntry]


class Best(Record):
    """The checkpoint with the best value of a metric so far."""

    step: Annotated[int, Field(ge=0, lt=2**62)]
    metric: str
    value: Annotated[float, Field(allow_inf_nan=False)]


def newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint of a folder, or None. Log a warning for each newer one that is damaged.

    Checkpoints up to `latest` come first, because the run has discarded later ones.
    """
    for step in _newest_first(folder):
        path = folder / directory_name(step)
        try:
            verify(path)
        except UserError as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
        else:
            return path
    return None


def verify(path: Path) -> None:
    """Check that every file of a checkpoint has the size and SHA-256 of the manifest.

    Raises:
        UserError: a file differs; the message names the first one.
    """
    for name, entry in read_manifest(path).files.items():
        file = path / name
        try:
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{file}: not a regular file; {USE_OLDER}")
            if status.st_size != entry.bytes:
                raise UserError(f"{file}: damaged: found {status.st_size} bytes, expected {entry.bytes}; {USE_OLDER}")
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}; {USE_OLDER}") from None
        if digest != entry.sha256:
            raise UserError(f"{file}: damaged: its SHA-256 differs from manifest.json; {USE_OLDER}")


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint. Raises UserError naming the file if it is missing or damaged."""
    return read_record(path / "manifest.json", Manifest)


def read_best(folder: Path) -> Best | None:
    """Return the best checkpoint of a folder; None if none is marked. Raises UserError if best.json is damaged."""
    return read_record(folder / "best.json", Best) if (folder / "best.json").exists() else None


def write_best(folder: Path, best: Best) -> None:
    """Mark a checkpoint as the best of a folder."""
    write_atomically(folder / "best.json", best.model_dump_json().encode())


def directory_name(step: int) -> str:
    """Return the directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoint directories, unsorted. Their content is not checked."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        matches = [_COMPLETE.fullmatch(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [int(match[1]) for match in matches if match]


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint, whose content is not checked; None if there is none."""
    return next(iter(_newest_first(folder)), None)


def _newest_first(folder: Path) -> list[int]:
    """Return the steps of all checkpoints, the newest first, and last those after `latest`, which are discarded."""
    return newest_first(steps(folder), _latest_step(folder))


def newest_first(steps: Iterable[int], latest: int | None) -> list[int]:
    """Return steps with the newest first, and last those after `latest`, which are discarded."""
    found = sorted(steps, reverse=True)
    return found if latest is None else sorted(found, key=lambda step: step > latest)


def _latest_step(folder: Path) -> int | None:
    """Return the step in the file `latest`; None if there is none. Its checkpoint may not have its name yet."""
    try:
        return named_step(read_bounded(folder / "latest", 100))
    except UserError:
        return None


def named_step(content: bytes) -> int | None:
    """Return the step of the checkpoint that the content of the file `latest` names; None if it names none."""
    match = _COMPLETE.fullmatch(content.decode(errors="replace").strip())
    return int(match[1]) if match else None


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write and sync a new file. Return its size and SHA-256."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return FileEntry(bytes=file.tell(), sha256=digest.hexdigest())


def publish(temporary: Path, path: Path) -> None:
    """Make a complete directory the latest and give it its final name. Replace a directory of that name."""
    # First, because a checkpoint after `latest` counts as discarded: a kill in between must not make it one.
    write_atomically(path.parent / "latest", f"{path.name}\n".encode())
    publish_folder(temporary, path, replaced_as=_aside(path))


def prune(folder: Path, newest: int, keep: int, in_use: Collection[int] = ()) -> None:
    """Remove all checkpoints except the best one, the newest `keep` up to step `newest`, and those in use.

    Damaged checkpoints are not counted and not removed, so that you can inspect them.
    """
    try:
        best = read_best(folder)
    except UserError as error:
        logger.error("all old checkpoints kept, because the best one is unknown: %s", error)
        return
    whole = [step for step in steps(folder) if _looks_whole(folder / directory_name(step))]
    kept = set(sorted(step for step in whole if step <= newest)[-keep:]) | ({best.step} if best else set())
    for step in set(whole) - kept - set(in_use):
        path = folder / directory_name(step)
        # Renamed first, so that a crash leaves no incomplete directory under the final name.
        shutil.rmtree(_aside(path), ignore_errors=True)
        path.rename(_aside(path))
        shutil.rmtree(_aside(path), ignore_errors=True)
        if step > newest:
            logger.info("removed the checkpoint of step %d: the run continued from an earlier one", step)


def settle_unfinished(folder: Path) -> None:
    """Publish a complete checkpoint that a killed writer had not renamed. Remove other leftovers. Raises OSError."""
    if not folder.is_dir():
        return
    # In reverse order: remove a replaced checkpoint (.removed.tmp) only after its successor is published.
    for path in sorted(folder.iterdir(), reverse=True):
        if _HALF_WRITTEN.fullmatch(path.name):
            path.unlink()
            continue
        match = _UNFINISHED.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if match[2] or not verifies(path):
            shutil.rmtree(path)
        else:
            publish(path, folder / match[1])


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.removed.tmp")


def verifies(path: Path) -> bool:
    """Return True if a checkpoint passes `verify`."""
    try:
        verify(path)
    except UserError:
        return False
    return True


def _looks_whole(path: Path) -> bool:
    try:
        return all((path / name).stat().st_size == entry.bytes for name, entry in read_manifest(path).files.items())
    except (OSError, UserError):
        return False


_AnyRecord = TypeVar("_AnyRecord", bound=Record)


def read_record(file: Path, kind: type[_AnyRecord], *, limit: int = JSON_LIMIT) -> _AnyRecord:
    """Return the content of a JSON file of at most `limit` bytes. Raises UserError if it is missing or damaged."""
    return parse_record(read_bounded(file, limit), kind, file)


def parse_record(content: bytes, kind: type[_AnyRecord], name: object) -> _AnyRecord:
    """Return the content of a JSON file as a record. Raises UserError, which begins with `name`, if it is damaged."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        raise UserError(f"{name}: damaged: {place}: {first['msg']}; {USE_OLDER}") from None
