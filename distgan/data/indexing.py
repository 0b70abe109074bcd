"""Building an index: the headers of all shards are walked, in parallel; of the contents only labels are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distgan.data import locations
from distgan.data.index_table import ARRAYS, EXTENSIONS, MAX_CLASSES, Index, Shard, concatenate
from distgan.data.tar import WindowReader, walk
from distgan.errors import UserError

_HASH_CHUNK = 16 << 20
Progress = Callable[[int, int], None]
"""Called with the number of shards done and of all shards."""


def build_index(
    shards: str | Sequence[str],
    *,
    verify: bool = False,
    progress: Progress | None = None,
    class_names: Sequence[str] | None = None,
) -> Index:
    """Index tars by walking their headers; of the contents only labels are read (and everything with `verify`).

    Args:
        shards: folder, glob, brace expansion, path or URL of tars, or a list of these.
        verify: also store the SHA-256 of each whole shard, against which downloads are then checked.

    Raises:
        UserError: naming the shard and member that is wrong.
    """
    urls = locations.expand(shards)
    scans: list[_Scan] = []
    with ThreadPoolExecutor(max_workers=32 if locations.is_remote(urls[0]) else 4) as pool:
        try:
            for scan in pool.map(lambda url: _scan(url, verify), urls):
                scans.append(scan)
                if progress is not None:
                    progress(len(scans), len(urls))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    labelled = [scan for scan in scans if scan.arrays["labels"][0] >= 0]
    if labelled and len(labelled) < len(scans):
        without = next(scan for scan in scans if scan.arrays["labels"][0] < 0)
        raise UserError(
            f"{locations.public_name(without.shard.url)}: has no .cls labels, but "
            f"{locations.public_name(labelled[0].shard.url)} has; label all samples or none"
        )
    arrays = concatenate([scan.arrays for scan in scans])
    if class_names is not None and labelled and len(class_names) <= int(arrays["labels"].max()):
        raise UserError(
            f"{len(class_names)} class names for labels up to {int(arrays['labels'].max())}; name each class"
        )
    return Index([scan.shard for scan in scans], arrays, class_names)


@dataclass(frozen=True)
class _Scan:
    shard: Shard
    arrays: dict[str, NDArray[Any]]


def _scan(url: str, verify: bool) -> _Scan:
    """Walk one shard. Raises UserError."""
    name = locations.public_name(url)
    digest = hashlib.sha256()
    images: dict[bytes, tuple[int, int, int, int]] = {}
    labels: dict[bytes, int] = {}
    try:
        with WindowReader(url) as reader:
            size = reader.size
            for member in walk(reader, name, digest):
                key, extension = split_name(member.name)
                if extension == "cls":
                    if key in labels:
                        raise UserError(
                            f"{name}: two labels for the key {_text(key)!r}; keys within a shard are unique"
                        )
                    content = reader.read(member.offset, min(member.size, 32))
                    digest.update(content)
                    labels[key] = _parse_label(content, name, member.name)
                elif extension in EXTENSIONS:
                    if key in images:
                        raise UserError(
                            f"{name}: two images for the key {_text(key)!r}; keys within a shard are unique"
                        )
                    images[key] = (member.offset, member.size, member.crc, EXTENSIONS.index(extension))
            sha256 = _sha256(reader) if verify else None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not images:
        raise UserError(f"{name}: no image in this tar; a sample is a member named KEY.jpg, .jpeg, .png or .webp")
    found = [labels.get(key, -1) for key in images]
    if min(found) < 0 <= max(found):
        without = next(key for key in images if key not in labels)
        raise UserError(f"{name}: {_text(without)!r} has no .cls label, but others have; label all samples or none")
    offsets, sizes, crcs, extensions = zip(*images.values(), strict=True)
    arrays = {
        "offsets": offsets,
        "sizes": sizes,
        "key_ends": np.cumsum([len(key) for key in images]),
        "labels": found,
        "header_crcs": crcs,
        "extensions": extensions,
        "keys": np.frombuffer(b"".join(images), np.uint8),
    }
    shard = Shard(url, size, len(images), digest.hexdigest(), sha256)
    return _Scan(shard, {array: np.asarray(values, ARRAYS[array]) for array, values in arrays.items()})


def split_name(name: bytes) -> tuple[bytes, str]:
    """WebDataset's key and extension of a member: cut at the first dot of the last part; ('', '') for hidden files."""
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not stem or not dot or (name.startswith(b"__") and name.endswith(b"__")):
        return b"", ""
    return folder + slash + stem, extension.lower().decode("ascii", "replace")


def _parse_label(content: bytes, shard: str, member: bytes) -> int:
    text = content.strip()
    if not text.isdigit() or len(text) > 9 or int(text) >= MAX_CLASSES:
        shown = f"{shard}: the label {_text(member)!r} holds {_text(text)!r}"
        raise UserError(f"{shown}; a label is a decimal number below {MAX_CLASSES:,}")
    return int(text)


def _sha256(reader: WindowReader) -> str:
    digest = hashlib.sha256()
    for start in range(0, reader.size, _HASH_CHUNK):
        digest.update(reader.read(start, _HASH_CHUNK))
    return digest.hexdigest()


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")[:200]
