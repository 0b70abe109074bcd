"""Images into WebDataset shards: ``KEY.jpg|png|webp`` and ``KEY.cls`` in tars, with an index beside them.

The bytes of every shard are a function of the images and the options, whatever the number of workers. A shard folder
appears whole, by one rename: all is first written to ``DEST.partial``, which a killed pack leaves behind and the next
one clears.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distgan.data.conversion import Conversion, ImageFormat
from distgan.data.index import INDEX_NAME, build_index, save_index
from distgan.data.layout import BadImage, Source, printable
from distgan.data.parallel import Converted, available_cores, convert_all
from distgan.data.shard_writer import ShardSize, ShardWriter
from distgan.data.sources import open_source
from distgan.errors import UserError

MAX_RESOLUTION = 4096
_KEY_DIGITS = 8
_OWN_NAME = re.compile(rf"shard-[0-9]{{6,}}\.tar|{re.escape(INDEX_NAME)}(\.[0-9]+-[0-9a-f]+\.tmp)?")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackReport:
    """What was packed."""

    dest: Path
    samples: int
    shards: int
    size: int
    """Bytes of all shards."""
    num_classes: int
    """0 without labels."""
    class_names: tuple[str, ...] | None
    skipped: tuple[str, ...]
    """Images left out as unreadable, as "NAME: reason", in the order of packing."""
    notes: tuple[str, ...]
    """Remarks on the source, one line each: files that are not images, links not followed, missing labels."""


def pack(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    shard_size: int | str = "256MB",
    resolution: int | None = None,
    image_format: ImageFormat = "keep",
    quality: int = 95,
    shuffle: bool = True,
    seed: int = 0,
    on_error: Literal["fail", "skip"] = "fail",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a source of images (see `open_source`) into shards and their index in the folder `dest`.

    A sample's key is the place of its image in the source, sorted by name, so that it can be traced back. Where there
    is more than one worker the calling script must be importable (``if __name__ == "__main__":``), as for all of
    Python's multiprocessing.

    Args:
        shard_size: samples of a shard (500), or bytes ("64MB").
        resolution: crop the central square and resize it to this many pixels a side; None keeps each image's size.
        image_format: what images are re-encoded to unless they are that already; "keep" changes only images that were
            resized or lay on their side, and makes raw pixels png.
        quality: of newly encoded jpg and webp, 1 to 100.
        shuffle: pack in a random order that depends on `seed` alone; else in the source's order.
        on_error: "fail" stops at an image that cannot be read, "skip" leaves it out and reports it.
        workers: processes; None is one per available core, 1 is this process.
        overwrite: replace a folder of shards and their index that `pack` wrote; any other folder that is not
            empty is left alone.
        progress: called with (images done, images in total).

    Raises:
        UserError: one line; `dest` is then as it was.
    """
    limit = ShardSize.parse(shard_size)
    _check_options(resolution, image_format, quality, seed, on_error, workers)
    conversion = Conversion(resolution, image_format, quality)
    if "://" in os.fspath(dest):
        raise UserError(f"{os.fspath(dest)}: a URL; pack into a local folder and copy that")
    folder = Path(dest).resolve()
    _check_dest(folder, overwrite)
    images = open_source(source)
    order = shuffled(len(images.names), seed) if shuffle else np.arange(len(images.names))
    with _disk_errors(folder), _partial(folder) as partial:
        with ShardWriter(partial, limit) as writer:
            converted = convert_all(images, order, conversion, workers or available_cores())
            with contextlib.closing(converted):
                skipped = _write(images, order, converted, writer, on_error, progress)
        if len(skipped) == len(order):
            raise UserError(f"{source}: none of its {len(order)} images can be read; the first: {skipped[0]}")
        index = build_index(str(partial), class_names=images.class_names)
        save_index(index, partial)
        _publish(partial, folder)
    return PackReport(
        dest=folder,
        samples=len(order) - len(skipped),
        shards=len(writer.paths),
        size=writer.size,
        num_classes=index.num_classes,
        class_names=images.class_names,
        skipped=tuple(skipped),
        notes=images.notes,
    )


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of `count` that is the same everywhere and always: the ranks of raw 64-bit Philox4x64-10 words.

    NumPy promises the words of its bit generators to stay as they are, but not the methods built upon them.
    """
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable").astype(np.int64)


def _write(
    images: Source[Any],
    order: NDArray[np.int64],
    converted: Iterator[list[Converted]],
    writer: ShardWriter,
    on_error: str,
    progress: Progress | None,
) -> list[str]:
    """Write all samples in order; the lines of those left out."""
    skipped: list[str] = []
    done = 0
    for chunk in converted:
        for number, image in zip(order[done : done + len(chunk)].tolist(), chunk, strict=True):
            if isinstance(image, BadImage):
                line = f"{printable(images.names[number])}: {image}"
                if on_error == "fail":
                    raise UserError(f"{line}; repair or remove it, or leave such images out with --on-error skip")
                skipped.append(line)
                continue
            members = {image.extension: image.data}
            if images.labels is not None:
                members["cls"] = b"%d" % images.labels[number]
            writer.add(f"{number:0{_KEY_DIGITS}d}", members)
        done += len(chunk)
        if progress is not None:
            progress(done, len(order))
    return skipped


def _check_options(
    resolution: int | None, image_format: str, quality: int, seed: int, on_error: str, workers: int | None
) -> None:
    if resolution is not None and not 1 <= resolution <= MAX_RESOLUTION:
        raise UserError(f"resolution {resolution}: expected pixels a side, 1 to {MAX_RESOLUTION}")
    if image_format not in get_args(ImageFormat):
        raise UserError(f"image format {image_format!r}: expected one of {', '.join(get_args(ImageFormat))}")
    if not 1 <= quality <= 100:
        raise UserError(f"quality {quality}: expected 1 to 100")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed}: expected a whole number from 0 to 2^63 - 1")
    if on_error not in ("fail", "skip"):
        raise UserError(f"on-error {on_error!r}: expected fail or skip")
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers}: expected 1 or more")


def _check_dest(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the shards")
    if folder.is_mount():
        raise UserError(f"{folder}: is a mount point, which cannot appear by a rename; name a folder inside it")
    if any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder}: is not empty; name another folder, or replace its shards with --overwrite")
        _check_only_shards(folder)
        if not (folder / INDEX_NAME).is_file():
            raise UserError(f"{folder}: has no {INDEX_NAME}, so it is not replaced; remove it, or name another folder")


def _check_only_shards(folder: Path) -> None:
    """Only folders that hold nothing but what `pack` writes are ever removed."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file() or not _OWN_NAME.fullmatch(path.name):
            raise UserError(
                f"{folder}: holds {printable(path.name)}, which pack did not write, and is not removed; move it away"
            )


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """An empty folder `DEST.partial`, held by this process alone and gone at the end unless it was renamed."""
    partial = folder.with_name(folder.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, folder)
        _check_only_shards(partial)
        for path in partial.iterdir():
            path.unlink()
        try:
            yield partial
        finally:
            if partial.exists():
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another pack is writing there; wait for it, or name another folder") from None
    except OSError:
        pass  # a file system without locks: packing there twice at once is the user's own care


def _publish(partial: Path, folder: Path) -> None:
    """Let the finished folder appear, in place of an empty one or of old shards that were to be replaced."""
    if folder.exists():
        # The index goes first: without it, what is left of the old shards does not look finished.
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".tar"):
            path.unlink()
    partial.rename(folder)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f" ({printable(str(error.filename))})" if error.filename else ""
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}{place}; free space there, or name another folder"
        ) from None
