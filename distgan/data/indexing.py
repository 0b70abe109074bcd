"""Building an index: the headers of all shards are walked, in parallel; of images nothing else is read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.data import locations, patterns, text
from distgan.data.index_table import ARRAYS, EXTENSIONS, KINDS, MAX_CLASSES, Index, Shard, concatenate, kind_of
from distgan.data.tar import Digest, WindowReader, walk
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
    """Index tars by walking their headers, and reading labels, text and points (and everything with `verify`).

    The characters of text are numbered by how frequent they are in these shards.

    Args:
        shards: folder, glob, brace expansion, path or URL of tars, or a list of these.
        verify: also store the SHA-256 of each whole shard, against which downloads are then checked.

    Raises:
        UserError: naming the shard and member that is wrong.
    """
    urls = patterns.expand(shards)
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
    for scan in scans:
        if scan.kind != scans[0].kind:
            raise UserError(
                f"{locations.public_name(scan.shard.url)}: holds {scan.kind}, but "
                f"{locations.public_name(scans[0].shard.url)} holds {scans[0].kind}; index shards of each kind apart"
            )
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
    vocabulary = None
    if scans[0].kind == "text":
        vocabulary = text.make_vocabulary(sum((scan.characters for scan in scans), Counter()))
    return Index([scan.shard for scan in scans], arrays, class_names, vocabulary)


@dataclass(frozen=True)
class _Scan:
    shard: Shard
    kind: str
    arrays: dict[str, NDArray[Any]]
    characters: Counter[str] = field(default_factory=Counter)
    """How often each occurs, in a shard of text."""


class _Found(NamedTuple):
    """A member that may be a sample: its data's place, size and header's CRC-32, and its extension's number."""

    offset: int
    size: int
    crc: int
    extension: int


def _scan(url: str, verify: bool) -> _Scan:
    """Walk one shard. Raises UserError."""
    name = locations.public_name(url)
    digest = hashlib.sha256()
    found: dict[str, dict[bytes, _Found]] = {kind: {} for kind in KINDS}
    twice: dict[str, bytes] = {}
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
                    kind = kind_of(extension)
                    if key in found[kind]:
                        twice.setdefault(kind, key)
                    where = member.offset, member.size, member.crc
                    found[kind][key] = _Found(*where, EXTENSIONS.index(extension))
            kind = next((kind for kind in KINDS if found[kind]), "")
            samples = found.get(kind, {})
            characters = _read_contents(reader, samples.values(), kind, digest, name)
            sha256 = _sha256(reader) if verify else None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not samples:
        raise UserError(f"{name}: no sample in this tar; a sample is a member named KEY.{', .'.join(EXTENSIONS)}")
    if kind in twice:
        raise UserError(f"{name}: two {kind} for the key {_text(twice[kind])!r}; keys within a shard are unique")
    of_samples = [labels.get(key, -1) for key in samples]
    if min(of_samples) < 0 <= max(of_samples):
        without = next(key for key in samples if key not in labels)
        raise UserError(f"{name}: {_text(without)!r} has no .cls label, but others have; label all samples or none")
    offsets, sizes, crcs, extensions = zip(*samples.values(), strict=True)
    arrays = {
        "offsets": offsets,
        "sizes": sizes,
        "key_ends": np.cumsum([len(key) for key in samples]),
        "labels": of_samples,
        "header_crcs": crcs,
        "extensions": extensions,
        "keys": np.frombuffer(b"".join(samples), np.uint8),
    }
    shard = Shard(url, size, len(samples), digest.hexdigest(), sha256)
    typed = {array: np.asarray(values, ARRAYS[array]) for array, values in arrays.items()}
    return _Scan(shard, kind, typed, characters)


def _read_contents(
    reader: WindowReader, samples: Iterable[_Found], kind: str, digest: Digest, shard: str
) -> Counter[str]:
    """The characters of a shard's text. What text and points hold is hashed too, as their headers tell little of it."""
    characters: Counter[str] = Counter()
    for sample in samples if kind != "images" else ():
        if sample.size > text.MAX_LINE_BYTES:
            raise UserError(
                f"{shard}: a sample of {sample.size:,} bytes; a line of text or a point has at most "
                f"{text.MAX_LINE_BYTES:,}"
            )
        content = reader.read(sample.offset, sample.size)
        digest.update(content)
        if kind == "text":
            characters.update(content.decode("utf-8", "ignore"))
    return characters


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
