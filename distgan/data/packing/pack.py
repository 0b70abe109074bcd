"""Pack samples into WebDataset shards: tars of ``KEY.jpg|png|webp|txt|npy`` and ``KEY.cls``, and their index.

The bytes of the shards depend on the samples and the options, but not on the number of workers. Shards are first
written to ``DEST.partial``; one rename then publishes the whole folder. A killed pack leaves ``DEST.partial`` behind,
and the next pack clears it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distgan.config.fields import rgb
from distgan.data.index.build import index_shards
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index, describe_gaps
from distgan.data.packing.conversion import Conversion, ImageFormat
from distgan.data.packing.output_folder import HELD_OUT, check_free, new_folder
from distgan.data.packing.sources.arrays import encode_point
from distgan.data.packing.sources.lines import encode_line
from distgan.data.packing.sources.opening import open_source
from distgan.data.packing.sources.source import Encoded, Facts, InvalidSampleError, Source
from distgan.data.packing.tar_writer import ShardSize, ShardWriter
from distgan.data.packing.workers import Converted, available_cores, convert_all
from distgan.errors import UserError, counted, printable

MAX_RESOLUTION = 4096
_KEY_DIGITS = 8

ReportProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackReport:
    """Result of a pack."""

    dest: Path
    samples: int
    """Number of samples in the training shards, without held-out samples."""
    shards: int
    size: int
    """Total bytes of the shards."""
    num_classes: int
    """Number of classes; 0 without labels."""
    class_names: tuple[str, ...] | None
    skipped: tuple[str, ...]
    """Unreadable samples that were left out, as "NAME: reason", in the order of packing."""
    notes: tuple[str, ...]
    """Notes on the source, one line each: ignored files, links that were not followed, missing labels."""
    held_out: int = 0
    """Number of samples in the folder `held-out`."""


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
    held_out: float = 0.0,
    points: int | None = None,
    stack: int | None = None,
    background: str | None = None,
    follow_links: bool = False,
    on_error: Literal["fail", "skip"] = "fail",
    workers: int | None = None,
    overwrite: bool = False,
    progress: ReportProgress | None = None,
) -> PackReport:
    """Pack a source of samples (see `open_source`) into shards with an index in the folder `dest`; return a report.

    A sample's key is its position in the source, so that you can trace it back. Images are sorted by name. With more
    than one worker, the calling script must be importable (``if __name__ == "__main__":``), as for Python's
    multiprocessing.

    Args:
        shard_size: samples per shard (500), or bytes per shard ("64MB").
        resolution: pixels per side, 1 to 4096: crop the central square and resize it. None keeps each image's size.
        image_format: format of the images. "keep" re-encodes only images that were resized, rotated or composited, and
            encodes raw pixels as png.
        quality: quality of newly encoded jpg and webp images, 1 to 100.
        shuffle: pack in a random order that depends only on `seed`; False keeps the source's order.
        seed: random seed for shuffling, the held-out split, built-in points and stacked digits, 0 to 2^63 - 1.
        held_out: fraction of the text lines to write to shards in `dest`/held-out, with an index of their own, from 0
            to below 1. The split depends on `seed` and the line, so that equal lines stay together.
        points: number of points to draw for builtin:ring or builtin:grid; None draws 100,000.
        stack: number of images to make of gray digits with labels, such as MNIST's: the channels of each are three
            random digits a, b, c, and its label is 100 a + 10 b + c. None packs the digits themselves.
        background: color (see `data.background`) behind all transparent images. None composites on white only the
            images that change anyway, and keeps the transparency of the others.
        follow_links: in a folder of images, follow links to folders and to targets outside the folder.
        on_error: "fail" stops at an unreadable sample, "skip" leaves it out and reports it.
        workers: number of worker processes; None uses one per available core, 1 uses only this process.
        overwrite: replace shards and an index that `pack` wrote. Other non-empty folders stay unchanged.
        progress: called with (finished samples, total samples).

    Raises:
        UserError: the message is one line. `dest` stays unchanged.
    """
    limit = ShardSize.parse(shard_size)
    _check_options(resolution, image_format, quality, seed, held_out, on_error, workers)
    if "://" in os.fspath(dest):
        raise UserError(f"{os.fspath(dest)}: found a URL, expected a local folder; pack into one and copy it")
    folder = Path(dest).resolve()
    check_free(folder, overwrite=overwrite)
    try:
        color = rgb(background) if background is not None else None
    except ValueError as error:
        raise UserError(f"background: {error}") from None
    samples = open_source(source, points=points, stack=stack, seed=seed, follow_links=follow_links)
    _check_fits(samples, resolution, image_format, held_out)
    conversion = (
        Conversion(resolution, image_format, quality, color) if samples.kind == "images" else _ENCODERS[samples.kind]
    )
    packing = _Packing(os.fspath(source), samples, conversion, limit, workers or available_cores(), on_error, progress)
    order = shuffled(len(samples.names), seed) if shuffle else np.arange(len(samples.names))
    aside = _drawn_aside(samples, held_out, seed)[order]
    if held_out and not 0 < aside.sum() < len(aside):
        raise UserError(
            f"held-out {held_out:g}: the split holds out {aside.sum()} of {len(aside)} lines; choose another fraction"
        )
    with new_folder(folder, overwrite=overwrite) as partial:
        written = packing.write(partial, order[~aside])
        held = packing.write(partial / HELD_OUT, order[aside], done=int((~aside).sum())) if held_out else None
    return PackReport(
        dest=folder,
        samples=len(written.index),
        shards=len(written.index.shards),
        size=sum(shard.size for shard in written.index.shards),
        num_classes=written.index.num_classes,
        class_names=samples.class_names,
        skipped=(*written.skipped, *(held.skipped if held else ())),
        notes=(*samples.notes, *written.seen.notes(background or "white"), *describe_gaps(written.index.labels)),
        held_out=len(held.index) if held else 0,
    )


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Return a reproducible permutation of range(count), int64: the ranks of raw 64-bit Philox4x64-10 words.

    NumPy keeps the output of its bit generators stable across versions, but not of the methods built on them.
    """
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class _Written:
    """A folder of shards."""

    index: Index
    skipped: list[str]
    seen: _Seen


@dataclass
class _Seen:
    """Facts about all images, for notes."""

    kept_transparent: int = 0
    composited: int = 0
    deep: int = 0
    deepest: int = 0

    def add(self, facts: Facts) -> None:
        self.composited += facts.composited
        self.kept_transparent += facts.transparent and not facts.composited
        if facts.deepest is not None:
            self.deep += 1
            self.deepest = max(self.deepest, facts.deepest)

    def notes(self, background: str) -> Iterator[str]:
        if self.composited:
            yield f"composited {counted(self.composited, 'transparent image')} on {background} (--background)"
        if self.kept_transparent:
            yield (
                f"kept the transparency of {counted(self.kept_transparent, 'image')}: training composites it on "
                "data.background (default: white), but other readers may not; set --background to composite it now"
            )
        if self.deep and self.deepest < 1 << 15:
            yield (
                f"the largest value in {counted(self.deep, '16-bit image')} is {self.deepest:,} of 65,535, which "
                "appears dark; scale the values to 16 bits before packing"
            )


_ENCODERS: dict[str, Callable[[Any], Encoded]] = {"text": encode_line, "points": encode_point}


@dataclass(frozen=True)
class _Packing:
    """Settings that all shards of a pack share."""

    source: str
    samples: Source[Any]
    conversion: Callable[[Any], Encoded]
    limit: ShardSize
    workers: int
    on_error: str
    progress: ReportProgress | None

    def write(self, folder: Path, order: NDArray[np.int64], *, done: int = 0) -> _Written:
        """Write shards of these samples in this order, and their index. `done` samples were written elsewhere before.

        Raises UserError for an unreadable sample if `on_error` is "fail", and if no sample is readable.
        """
        folder.mkdir(exist_ok=True)
        with (
            ShardWriter(folder, self.limit) as writer,
            contextlib.closing(convert_all(self.samples, order, self.conversion, self.workers)) as converted,
        ):
            seen = _Seen()
            skipped = self._write_all(order, converted, writer, done, seen)
        if len(skipped) == len(order):
            raise UserError(
                f"{self.source}: none of the {len(order)} samples are readable; fix the first: {skipped[0]}"
            )
        index = index_shards(str(folder), class_names=self.samples.class_names).index
        save_index(index, folder)
        return _Written(index, skipped, seen)

    def _write_all(
        self,
        order: NDArray[np.int64],
        converted: Iterable[list[Converted]],
        writer: ShardWriter,
        done: int,
        seen: _Seen,
    ) -> list[str]:
        """Write all samples and return one line per sample that was left out."""
        skipped: list[str] = []
        numbers = iter(order.tolist())
        for chunk in converted:
            for sample, number in zip(chunk, numbers, strict=False):
                if isinstance(sample, InvalidSampleError):
                    line = f"{printable(self.samples.names[number])}: {sample}"
                    if self.on_error == "fail":
                        raise UserError(f"{line}; repair or remove it, or skip such samples with --on-error skip")
                    skipped.append(line)
                    continue
                seen.add(sample.facts)
                members = {sample.extension: sample.data}
                if self.samples.labels is not None:
                    members["cls"] = b"%d" % self.samples.labels[number]
                writer.add(f"{number:0{_KEY_DIGITS}d}", members)
            done += len(chunk)
            if self.progress is not None:
                self.progress(done, len(self.samples.names))
        return skipped


def _drawn_aside(samples: Source[Any], share: float, seed: int) -> NDArray[np.bool_]:
    """Return a mask of held-out lines, bool (n,). A keyed hash decides, so that equal lines go together."""
    if not share:
        return np.zeros(len(samples.names), np.bool_)
    key = b"held-out/%d" % seed
    hashes = (hashlib.blake2b(samples.read(slot), digest_size=8, key=key).digest() for slot in samples.slots)
    drawn = (int.from_bytes(digest, "little") < share * 2**64 for digest in hashes)
    return np.fromiter(drawn, np.bool_, len(samples.names))


def _check_options(
    resolution: int | None,
    image_format: str,
    quality: int,
    seed: int,
    held_out: float,
    on_error: str,
    workers: int | None,
) -> None:
    if resolution is not None and not 1 <= resolution <= MAX_RESOLUTION:
        raise UserError(f"resolution {resolution}: expected pixels per side, 1 to {MAX_RESOLUTION}")
    if image_format not in get_args(ImageFormat):
        raise UserError(f"image format {image_format!r}: expected one of {', '.join(get_args(ImageFormat))}")
    if not 1 <= quality <= 100:
        raise UserError(f"quality {quality}: expected 1 to 100")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed}: expected a whole number from 0 to 2^63 - 1")
    if not 0 <= held_out < 1:
        raise UserError(f"held-out {held_out:g}: expected a fraction of the lines from 0 to below 1, such as 0.1")
    if on_error not in ("fail", "skip"):
        raise UserError(f"on-error {on_error!r}: expected fail or skip")
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers}: expected 1 or more")


def _check_fits(samples: Source[Any], resolution: int | None, image_format: str, held_out: float) -> None:
    """Raise UserError for options that do not apply to this kind of samples."""
    if samples.kind != "images" and (resolution is not None or image_format != "keep"):
        raise UserError(f"resolution, format: these options need images, found {samples.kind}; remove them")
    if samples.kind != "text" and held_out:
        raise UserError(f"held-out: this option needs lines of text, found {samples.kind}; remove it")
