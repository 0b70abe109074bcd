"""The index: location and label of each sample, and a fingerprint of all shards.

A sample is the members of one tar that share a key: the name up to the first dot of its last part, as in WebDataset.
One member holds the data, and `.cls` holds a decimal class label. Other members are skipped. All samples of an index
have the same kind.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.data.kinds.latents import LATENT, MOMENTS, StoredLatents
from distgan.data.storage import locations
from distgan.errors import printable

OTHER = "*"
"""Stands for the extension that the user named, of files that only `data.stages` reads."""
KINDS = {
    "latents": (MOMENTS, LATENT),
    "images": ("jpg", "jpeg", "png", "webp"),
    "points": ("npy",),
    "text": ("txt",),
    "other files": (OTHER,),
}
"""Extensions of sample data by kind. A tar has the first of these kinds that it holds: images beside latents are what
these encode, and arrays and texts beside images are features and captions."""
EXTENSIONS = (*itertools.chain.from_iterable(KINDS[kind] for kind in KINDS if kind != "latents"), *KINDS["latents"])
"""Extensions of sample data; the index stores positions in this tuple."""
MAX_CLASSES = 1_000_000
ARRAYS: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in (
        ("offsets", np.int64),
        ("sizes", np.int64),
        ("span_starts", np.int64),
        ("span_sizes", np.int64),
        ("key_ends", np.int64),
        ("labels", np.int32),
        ("header_crcs", np.uint32),
        ("extensions", np.uint8),
        ("keys", np.uint8),
    )
}
"""Per sample: byte offset and size of its data in its shard, byte offset and size of all its members with their
headers, end of its key in `keys`, class label or -1, CRC-32 of the tar header before its data, and position of its
extension in `EXTENSIONS`. `keys` holds the bytes of all keys."""


@dataclass(frozen=True)
class Shard:
    """One tar. `url` is an absolute path or a URL; `size` is in bytes; `count` is its number of samples."""

    url: str
    size: int
    count: int
    header_digest: str
    """SHA-256 of its header blocks and labels, and of the data of text, points and latents."""
    sha256: str | None = None
    """SHA-256 of the whole file; None if the index was built without `verify`."""


class Source(NamedTuple):
    """A part of an index that is mixed with others by weight."""

    weight: int
    samples: range
    shards: range


class Index:
    """All samples of a set of shards, numbered from 0 in shard order; immutable, and cheap to send to processes.

    Attributes:
        kind: a key of `KINDS`.
        shards: the shards in order.
        class_names: one name per class; None if the classes have no names.
        num_classes: number of classes; 0 without labels.
        any_remote: True if at least one shard is a URL.
        folder: the deepest folder that all shards share.
        vocabulary: characters by number (see `text.make_vocabulary`); None for kinds other than text.
        latents: shape, shift and scale of latents; None for other kinds.
        left_out: paths or URLs of tars that were indexed with these and hold no sample.
        shard_starts: int64 (len(shards) + 1,), the index of each shard's first sample.
        offsets, sizes, span_starts, span_sizes, labels, header_crcs, extensions, key_ends, keys: see `ARRAYS`;
            memory-mapped when loaded.
        sources: the parts that `data.path` mixes by weight, in order; empty if it names one source.
        fingerprint: SHA-256 hex of shard names (relative to their common folder), sizes and header digests; of several
            sources, of their weights and fingerprints.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        arrays: dict[str, NDArray[Any]],
        class_names: Sequence[str] | None = None,
        vocabulary: Sequence[str] | None = None,
        left_out: Sequence[str] = (),
        latents: StoredLatents | None = None,
        origin: tuple[Callable[..., Index], Any] | None = None,
        mixed: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Join shards and arrays.

        Args:
            origin: what reopens the index in other processes: (function, its first argument).
            mixed: weight and number of shards of each source.
        """
        self.shards = tuple(shards)
        self.class_names = tuple(class_names) if class_names is not None else None
        self.vocabulary = tuple(vocabulary) if vocabulary is not None else None
        self.left_out = tuple(left_out)
        self.latents = latents
        self.shard_starts: NDArray[np.int64] = np.cumsum([0, *(shard.count for shard in self.shards)], dtype=np.int64)
        self.offsets, self.sizes = arrays["offsets"], arrays["sizes"]
        self.span_starts, self.span_sizes = arrays["span_starts"], arrays["span_sizes"]
        self.labels, self.header_crcs = arrays["labels"], arrays["header_crcs"]
        self.extensions, self.keys, self.key_ends = arrays["extensions"], arrays["keys"], arrays["key_ends"]
        self.kind = kind_of(EXTENSIONS[self.extensions[0]])
        self.any_remote = any(locations.is_remote(shard.url) for shard in self.shards)
        self.folder = locations.common_folder([shard.url for shard in self.shards])
        self._mixed = tuple(mixed)
        self.sources = _sources(self._mixed, self.shard_starts)
        self.fingerprint = _fingerprint(self.shards, self.folder, self.sources)
        highest = int(self.labels.max()) if len(self.labels) else -1
        self.num_classes = max(highest + 1, len(self.class_names or ())) if highest >= 0 else 0
        self._origin = origin

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_jpegs(self) -> bool:
        """Return True if any sample has a JPEG extension. JPEG decoders may differ in the last bit of a pixel."""
        return bool(np.isin(self.extensions, [EXTENSIONS.index(name) for name in ("jpg", "jpeg")]).any())

    def __reduce__(self) -> tuple[Any, ...]:
        if self._origin is not None:
            reopen, where = self._origin
            return reopen, (where, self.fingerprint, self.vocabulary, self.latents)
        arrays = {name: getattr(self, name) for name in ARRAYS}
        given = self.shards, arrays, self.class_names, self.vocabulary, self.left_out, self.latents
        return Index, (*given, None, self._mixed)

    def with_vocabulary(self, vocabulary: Sequence[str]) -> Index:
        """Return the same text samples with another vocabulary."""
        return self._remade(self.class_names, vocabulary)

    def with_class_names(self, class_names: Sequence[str]) -> Index:
        """Return the same samples with these class names."""
        return self._remade(class_names, self.vocabulary)

    def _remade(self, class_names: Sequence[str] | None, vocabulary: Sequence[str] | None) -> Index:
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return Index(self.shards, arrays, class_names, vocabulary, self.left_out, self.latents, mixed=self._mixed)

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shard number of each sample, int64 with the shape of `samples`."""
        return np.searchsorted(self.shard_starts, samples, side="right") - 1

    def peers(self, sample: int) -> range:
        """Return the samples of the same source as a sample."""
        return next((source.samples for source in self.sources if sample in source.samples), range(len(self)))

    def key(self, sample: int) -> str:
        """Return the sample's WebDataset key."""
        return self.key_bytes(sample).decode("utf-8", "replace")

    def shard_name(self, shard: int) -> str:
        """Return a shard's name relative to the folder that all shards share."""
        return locations.relative_name(self.shards[shard].url, self.folder)

    def key_bytes(self, sample: int) -> bytes:
        """Return the sample's WebDataset key as it stands in the tar."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes()

    def name(self, sample: int) -> str:
        """Return `shard:key` in printable characters, for messages."""
        shard = int(self.shard_of(np.asarray([sample]))[0])
        return printable(f"{self.shard_name(shard)}:{self.key(sample)}")

    def entry(self, sample: int) -> tuple[int, int, int, int, str]:
        """Return shard number, byte offset and size of the data, CRC-32 of its tar header, and extension."""
        shard = int(self.shard_of(np.asarray([sample]))[0])
        where = int(self.offsets[sample]), int(self.sizes[sample]), int(self.header_crcs[sample])
        return shard, *where, EXTENSIONS[self.extensions[sample]]

    def span(self, sample: int) -> tuple[int, int]:
        """Return byte offset and size of all members of the sample with their headers."""
        return int(self.span_starts[sample]), int(self.span_sizes[sample])


def kind_of(extension: str) -> str:
    """Return the kind of samples with this extension, one of `EXTENSIONS`."""
    return next(kind for kind, extensions in KINDS.items() if extension in extensions)


def describe_gaps(labels: NDArray[np.integer]) -> tuple[str, ...]:
    """Return a line about unused labels below the largest one, or nothing. Their classes are never trained."""
    counts = np.bincount(labels[labels >= 0])
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return ()
    shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
    return (
        f"labels go up to {len(counts) - 1}, but no sample has label {shown}: a conditional run creates "
        f"{len(counts)} classes and never trains these; if they do not exist, number the labels from 0 without gaps",
    )


def concatenate(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Join the arrays of consecutive groups of shards into the arrays of one index."""
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ARRAYS}
    bases = np.cumsum([0, *(len(part["keys"]) for part in parts[:-1])], dtype=np.int64)
    arrays["key_ends"] += np.repeat(bases, [len(part["key_ends"]) for part in parts])
    return arrays


def _sources(mixed: Sequence[tuple[int, int]], starts: NDArray[np.int64]) -> tuple[Source, ...]:
    ends = np.cumsum([0, *(count for _, count in mixed)]).tolist()
    shards = [range(first, last) for first, last in itertools.pairwise(ends)]
    samples = [range(int(starts[part.start]), int(starts[part.stop])) for part in shards]
    weights = [weight for weight, _ in mixed]
    return tuple(Source(*fields) for fields in zip(weights, samples, shards, strict=True))


def _fingerprint(shards: Sequence[Shard], folder: str, sources: Sequence[Source] = ()) -> str:
    if sources:
        parts = [(source.weight, shards[source.shards.start : source.shards.stop]) for source in sources]
        folders = [locations.common_folder([shard.url for shard in part]) for _, part in parts]
        own = [[weight, _fingerprint(part, within)] for (weight, part), within in zip(parts, folders, strict=True)]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()
    table = [[locations.relative_name(shard.url, folder), shard.size, shard.header_digest] for shard in shards]
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()
