"""A source of images in a local folder."""

from __future__ import annotations

import os
from pathlib import Path

from distgan.data.packing.sources.source import (
    DATASET_JSON,
    MAX_BYTES,
    MAX_JSON_BYTES,
    InvalidSampleError,
    Source,
    assign_labels,
    check_any,
    describe_ignored,
    is_image,
)
from distgan.errors import UserError, counted, printable


class FolderReader:
    """Read a file of at most `max_bytes` bytes by its path relative to a folder."""

    def __init__(self, root: str, max_bytes: int = MAX_BYTES) -> None:
        self.root = root
        self.max_bytes = max_bytes

    def __call__(self, name: str) -> bytes:
        try:
            with open(f"{self.root}/{name}", "rb") as file:
                data = file.read(self.max_bytes + 1)
        except OSError as error:
            raise InvalidSampleError(f"cannot read the file: {error.strerror}") from None
        if len(data) > self.max_bytes:
            raise InvalidSampleError(f"file too large: expected at most {self.max_bytes} bytes")
        return data


def open_folder(path: Path, *, follow_links: bool = False, labeled: bool = True) -> Source[str]:
    """Open the images below `path`, labeled by a dataset.json at the top or by their first-level folder.

    Without `labeled`, the folders have no meaning, and images may be in any of them.

    By default, follows only links to files inside the folder, so that no other files get into the shards. With
    `follow_links`, follows all links except those to a folder that contains them.

    Raises:
        UserError: the folder cannot be read or labeled; the message names it.
    """
    root = os.path.realpath(path)
    names: list[str] = []
    strays: list[str] = []
    empty: set[str] = set()
    links = 0
    pending = [("", frozenset({_identity(root)}))]
    while pending:
        prefix, above = pending.pop()
        for entry in _entries(f"{root}/{prefix}", path):
            name = prefix + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_symlink() and not (_leads_somewhere(entry) if follow_links else _stays_inside(entry, root)):
                links += 1
            elif entry.is_dir(follow_symlinks=follow_links):
                identity = _identity(entry.path)
                if identity in above:
                    links += 1
                    continue
                pending.append((name + "/", above | {identity}))
                empty.add(name)
            elif entry.is_file() and is_image(name):
                names.append(name)
                empty.discard(name.partition("/")[0])
            elif name != DATASET_JSON:
                strays.append(name)
    names.sort()
    notes = describe_ignored(strays)
    if links:
        notes += (
            f"did not follow {counted(links, 'link')} (broken, to a folder, or to outside)"
            + ("" if follow_links else "; add --follow-links to follow links that are not broken"),
        )
    without = sorted(folder for folder in empty if "/" not in folder)
    if without and any("/" in name for name in names):
        notes += (
            f"ignored {counted(len(without), 'folder')} without images: {', '.join(map(printable, without[:8]))}",
        )
    if not labeled:
        check_any(names, str(path), notes)
        return Source(names, names, FolderReader(root), notes=notes)
    labels, class_names = assign_labels(names, _dataset_json(root, path), str(path), notes)
    return Source(names, names, FolderReader(root), labels, class_names, notes)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _leads_somewhere(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_file() or link.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str, shown: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{shown}: cannot list {error.filename!a}: {error.strerror}") from None


def _stays_inside(link: os.DirEntry[str], root: str) -> bool:
    try:
        return os.path.realpath(link.path).startswith(root.rstrip("/") + "/") and link.is_file()
    except OSError:  # a link to itself
        return False


def _dataset_json(root: str, shown: Path) -> bytes | None:
    path = os.path.join(root, DATASET_JSON)
    if not os.path.isfile(path) or os.path.islink(path):
        return None
    try:
        return FolderReader(root, MAX_JSON_BYTES)(DATASET_JSON)
    except InvalidSampleError as error:
        raise UserError(f"{shown}/{DATASET_JSON}: {error}") from None
