"""Sets of images that no run made or trains on: a folder, a zip, packed shards, or an .npz file of pixels."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distgan.config import DataConfig
from distgan.config.fields import rgb
from distgan.data.index.file import INDEX_NAME
from distgan.data.index.loading import load_index
from distgan.data.index.table import ARRAYS, EXTENSIONS, Index, Shard
from distgan.data.kinds.images import Pixels, decode_into, fit_square, open_image, to_channels
from distgan.data.packing.sources.folder import open_folder
from distgan.data.packing.sources.source import InvalidSampleError, LazySequence, Source
from distgan.data.packing.sources.zip_archive import open_zip
from distgan.data.storage.npz import checksum, is_npz, map_array
from distgan.data.storage.tar import BLOCK
from distgan.errors import UnreadableSampleError, UserError, printable
from distgan.evaluation.samples import Reals, SampleSet

log = logging.getLogger("distgan")

_EXPECTED = "expected a folder or zip of images, a folder of shards, or an .npz file of pixels arr_0"
_SHOWN = 5
"""Number of unreadable images that each rank names."""


class ImageSet(SampleSet):
    """Images in a fixed order. Labels are those of shards; other images have none."""

    def __init__(self, path: str, source: Source[Any], fingerprint: str, labels: NDArray[Any] | None = None) -> None:
        """Keep the facts.

        Args:
            path: as typed, for messages.
            source: its `read` returns a file's bytes or uint8 pixels (H, W, C), and raises OSError,
                InvalidSampleError or UnreadableSampleError.
            fingerprint: tells the contents apart from those of other sets.
        """
        count = len(source.names)
        # An index of one shard, at places that nothing reads.
        arrays: dict[str, NDArray[Any]] = {name: np.zeros(count, kind) for name, kind in ARRAYS.items()}
        arrays["extensions"] += EXTENSIONS.index("png")
        arrays["labels"] = np.full(count, -1, np.int32) if labels is None else labels
        super().__init__([Shard(os.path.abspath(path), 0, count, fingerprint)], arrays, source.class_names)
        self.path, self.source, self.fingerprint = path, source, fingerprint
        self._size: int | None = None
        self._shown = 0

    def require_size(self, size: int) -> None:
        """Refuse images of another height or width than `size`, in place of resizing them."""
        self._size = size
        # Statistics of resized images may be in the cache.
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} without resizing".encode()).hexdigest()

    def name(self, sample: int) -> str:
        """Return the image's path for messages."""
        return printable(f"{self.path}/{self.source.names[sample]}")

    def first_size(self) -> tuple[int, int]:
        """Return width and height of the first readable image. Raises UserError if none is readable."""
        reason = ""
        for number in range(len(self)):
            try:
                return _size_of(self.source.read(self.source.slots[number]))
            except (OSError, InvalidSampleError, UnreadableSampleError) as error:
                reason = reason or f"{self.name(number)}: {error}"
        raise UserError(f"{self.path}: none of the {len(self)} images can be read; the first: {reason}")

    def read(self, data: DataConfig, batches: Iterable[torch.Tensor]) -> Iterator[Reals]:
        """Yield the readable images of each batch of numbers (n,), in order. Warns of the first unreadable ones.

        Raises UserError if an image has another size than `require_size` allows.
        """
        for numbers in batches:
            images = np.empty((len(numbers), data.resolution, data.resolution, data.channels), np.uint8)
            kept = [self._decode(image, number, data) for image, number in zip(images, numbers.tolist(), strict=True)]
            readable = torch.tensor(kept, dtype=torch.bool)
            labels = torch.from_numpy(self.labels[numbers.numpy()].astype(np.int64))
            yield Reals(numbers[readable], torch.from_numpy(images).permute(0, 3, 1, 2)[readable], labels[readable])

    def _decode(self, out: Pixels, number: int, data: DataConfig) -> bool:
        """Decode an image. Returns False if it is not readable."""
        try:
            found = self.source.read(self.source.slots[number])
            self._check_size(found, number)
            if isinstance(found, bytes):
                decode_into(out, found, "", max_pixels=data.max_pixels, background=rgb(data.background))
            else:
                shown = to_channels(fit_square(Image.fromarray(found), data.resolution), data.channels)
                out[:] = np.asarray(shown).reshape(out.shape)
            return True
        except (OSError, InvalidSampleError, UnreadableSampleError) as error:
            self._shown += 1
            if self._shown <= _SHOWN:
                log.warning("%s: cannot be read: %s", self.name(number), printable(str(error)))
            return False

    def _check_size(self, found: bytes | Pixels, number: int) -> None:
        if self._size is None:
            return
        width, height = _size_of(found)
        if (width, height) != (self._size, self._size):
            raise UserError(
                f"{self.name(number)}: found {width} x {height} pixels, expected {self._size} x {self._size}, as the "
                f"first image; set data.resolution={self._size} to crop all images to squares and resize them"
            )


def _size_of(image: bytes | Pixels) -> tuple[int, int]:
    """Return width and height. Raises UnreadableSampleError."""
    if not isinstance(image, bytes):
        return image.shape[1], image.shape[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_image(image).size
    except UnreadableSampleError:
        raise
    except Exception as error:  # Pillow raises nearly everything on a damaged file
        raise UnreadableSampleError(" ".join(str(error).split()) or type(error).__name__) from None


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """Open a set of images. Logs what it ignores.

    Raises:
        UserError: there are no images, or something else; the message names the path.
    """
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"{text}: found a URL, {_EXPECTED}; copy it to a local disk first")
    local = Path(text)
    if local.is_dir() and ((local / INDEX_NAME).exists() or any(local.glob("*.tar"))):
        return _shards(text)
    if local.is_dir():
        folder = open_folder(local, follow_links=True, labeled=False)
        found = _set(text, folder, [_file_facts(local / name) for name in folder.names])
    elif not local.is_file():
        raise UserError(f"{text}: {'neither a file nor a folder' if local.exists() else 'no such path'}; {_EXPECTED}")
    elif is_npz(local):
        found = _npz(text)
    elif local.suffix.lower() == ".zip":
        archive = open_zip(local, labeled=False)
        found = _set(text, archive, [[member.size, member.checksum] for member in archive.slots])
    else:
        raise UserError(f"{text}: not a set of images; {_EXPECTED}")
    for note in found.source.notes:
        log.warning("%s: %s", text, note)
    return found


def _set(path: str, source: Source[Any], facts: Sequence[Any]) -> ImageSet:
    content = json.dumps([list(source.names), facts], ensure_ascii=True).encode()
    return ImageSet(path, source, hashlib.sha256(content).hexdigest())


def _file_facts(path: Path) -> list[int]:
    """Return size and time of a file, which tell a changed one apart."""
    try:
        status = path.stat()
    except OSError:
        return [-1]
    return [status.st_size, status.st_mtime_ns]


def _shards(path: str) -> ImageSet:
    index = load_index(path)
    if index.kind != "images":
        raise UserError(f"{path}: the shards hold {index.kind}, {_EXPECTED}")
    names = LazySequence(len(index), index.name)
    source = Source(names, range(len(index)), _shard_reader(index), class_names=index.class_names)
    return ImageSet(path, source, index.fingerprint, index.labels)


def _shard_reader(index: Index) -> Callable[[int], bytes]:
    def read(sample: int) -> bytes:
        shard, offset, size, crc, _ = index.entry(sample)
        with open(index.shards[shard].url, "rb") as file:
            file.seek(offset - BLOCK)
            data = file.read(size + BLOCK)
        if len(data) != size + BLOCK or zlib.crc32(data[:BLOCK]) != crc:
            raise UnreadableSampleError("the shard differs from its index; run `distgan index` again")
        return data[BLOCK:]

    return read


def _npz(path: str) -> ImageSet:
    pixels = map_array(Path(path), "arr_0")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise UserError(
            f"{path}: found arr_0 of {pixels.dtype} and shape {pixels.shape}, expected uint8 (images, height, width, 3)"
        )
    count = len(pixels)
    source: Source[int] = Source(LazySequence(count, lambda place: f"arr_0[{place}]"), range(count), pixels.__getitem__)
    facts = [checksum(Path(path), "arr_0"), *pixels.shape]
    return ImageSet(path, source, hashlib.sha256(json.dumps(facts).encode()).hexdigest())
