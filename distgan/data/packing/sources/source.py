"""Define sources of samples, and label images by folder or dataset.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from distgan.config import DataConfig
from distgan.data.index.table import MAX_CLASSES
from distgan.errors import UserError, counted, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DATASET_JSON = "dataset.json"
MAX_BYTES: int = DataConfig.model_fields["max_bytes"].default
"""Maximum bytes of one encoded image, as training reads by default."""
MAX_PIXELS: int = DataConfig.model_fields["max_pixels"].default
"""Maximum width x height of one image, as training reads by default."""
MAX_JSON_BYTES = 1 << 28
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "holdout", "unlabeled"}
"""Folder names that mean splits of a data set, not classes."""

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Slot = TypeVar("Slot")


class InvalidSampleError(Exception):
    """An unusable sample; the message is the reason, without the sample's name."""


class Facts(NamedTuple):
    """Facts about an image for the user."""

    transparent: bool = False
    deepest: int | None = None
    """Largest value of a 16-bit image; None for other images."""
    composited: bool = False
    """True if its transparency was composited on a background."""


class Encoded(NamedTuple):
    """A sample as the bytes of a file, and its extension in a shard."""

    data: bytes
    extension: str
    facts: Facts = Facts()


class LazySequence(Sequence[Any]):
    """A sequence that computes each item from its position on access."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self._length:
            raise IndexError(place)
        return self._make(place)


@dataclass(frozen=True)
class Source(Generic[Slot]):
    """Samples of one kind in a fixed order; sample i is ``read(slots[i])``.

    `read` returns an encoded image as bytes, uint8 pixels of shape (height, width), a line of text as bytes, or a float
    point of shape (dimensions,). It raises InvalidSampleError. `read` and the slots are pickled to worker processes.
    """

    names: Sequence[str]
    slots: Sequence[Slot]
    read: Callable[[Slot], Any]
    labels: Labels | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    """Notes for the user on ignored content, one line each."""
    kind: str = "images"
    """A key of `index.table.KINDS`."""


def pixel_source(
    names: Sequence[str],
    images: Pixels,
    labels: Labels | None = None,
    class_names: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> Source[Pixels]:
    """Create a source of decoded gray images: uint8 of shape (count, height, width), possibly memory-mapped."""
    return Source(names, list(images), _identity, labels, class_names, notes)


def _identity(pixels: Pixels) -> Pixels:
    return pixels


def is_image(name: str) -> bool:
    """Return True if a file's name has the suffix of a supported image format."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Return True if any part of a relative path is hidden or an archiver's own folder."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def assign_labels(
    names: Sequence[str], dataset_json: bytes | None, where: str, notes: Sequence[str] = ()
) -> tuple[Labels | None, tuple[str, ...] | None]:
    """Return labels and class names of images with these relative paths, from dataset.json or else by folder.

    Raises:
        UserError: there are no images, or the labels do not match the images. The message begins with `where`.
    """
    check_any(names, where, notes)
    if dataset_json is not None:
        return _labels_from_json(dataset_json, names, f"{where}/{DATASET_JSON}"), None
    return _labels_from_folders(names, where)


def check_any(names: Sequence[str], where: str, notes: Sequence[str] = ()) -> None:
    """Raise UserError if there are no images. The message begins with `where` and ends with the notes."""
    if not names:
        instead = "".join(f"; {note}" for note in notes)
        raise UserError(f"{where}: found no images, expected {', '.join(IMAGE_SUFFIXES)} files{instead}")


def describe_ignored(names: Iterable[str]) -> tuple[str, ...]:
    """Return one line that counts files other than images by suffix, or nothing without such files."""
    endings = Counter(
        "." + name.rpartition("/")[2].rpartition(".")[2] if "." in name else "without suffix" for name in names
    )
    if not endings:
        return ()
    common = ", ".join(f"{count} {printable(ending)[:20]}" for ending, count in endings.most_common(4))
    rest = ", ..." if len(endings) > 4 else ""
    verb = "is" if endings.total() == 1 else "are"
    return (f"ignored {counted(endings.total(), 'file')} that {verb} not {'/'.join(IMAGE_SUFFIXES)}: {common}{rest}",)


def _labels_from_folders(names: Sequence[str], where: str) -> tuple[Labels | None, tuple[str, ...] | None]:
    """Label images by their first-level folder. Classes are numbered in sorted order; a flat folder has no labels."""
    folders = [name.partition("/")[0] if "/" in name else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    if not classes:
        return None, None
    if None in folders:
        flat = names[folders.index(None)]
        raise UserError(
            f"{where}: found images both inside class folders ({printable(classes[0])}/) and outside "
            f"({printable(flat)}); put all images into class folders, or none"
        )
    for name in classes:
        if not name.isprintable():
            raise UserError(f"{where}: the class folder {printable(name)} has no printable UTF-8 name; rename it")
    if {name.lower() for name in classes} <= _SPLITS:
        raise UserError(
            f"{where}: found the splits {', '.join(classes)}, expected class folders; pack one split, such as "
            f"{where}/{classes[0]}, or rename the folders if they are classes"
        )
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[folder] for folder in folders], np.int64), tuple(classes)


def _labels_from_json(content: bytes, names: Sequence[str], where: str) -> Labels | None:
    """Parse StyleGAN's label file: ``{"labels": [["00000/img00000000.png", 6], ...]}``, or null for no labels."""
    accepted = 'expected {"labels": [["name.png", 0], ...]} or {"labels": null}'
    try:
        entries = json.loads(content)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: not a label file; {accepted}") from None
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise UserError(f"{where}: invalid labels: found {type(entries).__name__}, {accepted}")
    labels: dict[str, int] = {}
    for number, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f"{where}: entry {number} of labels is not a [name, label] pair; {accepted}")
        name, label = entry
        if type(label) is float and label.is_integer():  # some tools write labels from a float array
            label = int(label)
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            found = printable(repr(label))[:40]
            raise UserError(
                f"{where}: invalid label of {printable(name)}: found {found}, expected a whole number from 0 to "
                f"{MAX_CLASSES - 1}"
            )
        if labels.setdefault(name, label) != label:
            raise UserError(f"{where}: {printable(name)} has two labels, {labels[name]} and {label}; remove one")
    _check_same_names(names, labels, where)
    return np.array([labels[name] for name in names], np.int64)


def _own_name(labels: dict[str, int]) -> str:
    return f"it labels names such as {printable(next(iter(labels)))}" if labels else "it labels no image"


def _check_same_names(names: Sequence[str], labels: dict[str, int], where: str) -> None:
    unlabeled = [name for name in names if name not in labels]
    if unlabeled:
        raise UserError(
            f"{where}: no label for {printable(unlabeled[0])} ({len(unlabeled)} of {len(names)} images lack one); "
            f"{_own_name(labels)}; label all images, or set labels to null"
        )
    if len(labels) > len(names):
        absent = min(labels.keys() - set(names))
        raise UserError(
            f"{where}: found a label for {printable(absent)}, which is not an image ({len(labels)} labels, "
            f"{len(names)} images); expected names such as {printable(names[0])}"
        )
