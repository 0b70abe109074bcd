"""What an index holds: where each sample lies, its label, and a fingerprint of the whole.

A sample is the members of one tar that share a key: the name up to the first dot of its last part, as in WebDataset.
One of them is what is read; `.cls` holds a decimal class label; anything else is passed over. All samples of an index
are of one kind.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distgan.data.storage import locations
from distgan.errors import printable

KINDS = {"images": ("jpg", "jpeg", "png", "webp"), "points": ("npy",), "text": ("txt",)}
"""Extensions of the members that are samples, by kind. A tar's kind is the first of these that it holds any of: beside
images, arrays and texts are features and captions."""
EXTENSIONS = tuple(itertools.chain.from_iterable(KINDS.values()))
"""Members that are samples; an entry's extension is a number into this tuple."""
MAX_CLASSES = 1_000_000
ARRAYS: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in (
        ("offsets", np.int64),
        ("sizes", np.int64),
        ("key_ends", np.int64),
        ("labels", np.int32),
        ("header_crcs", np.uint32),
        ("extensions", np.uint8),
        ("keys", np.uint8),
    )
}
"""Per sample: byte offset and size of its data in its shard, where its key ends in `keys` (all keys' bytes, one after
another), class label or -1, CRC-32 of the tar header before its data, and extension."""


@dataclass(frozen=True)
class Shard:
    """One tar. `url` is an absolute path or a URL; `size` is in bytes; `count` is its number of samples."""

    url: str
    size: int
    count: int
    header_digest: str
    """SHA-256 of its header blocks and labels, and of the data of text and points."""
    sha256: str | None = None
    """Of the whole file, where the index was built with `verify`."""


class Index:
    """All samples of a set of shards, numbered from 0 in shard order; immutable, and cheap to send to processes.

    Attributes:
        kind: of `KINDS`.
        shards, class_names (None when the classes have no names), num_classes (0 when there are no labels), any_remote
            (whether some shards are not on this machine), folder (the one that all shards share).
        vocabulary: the characters that text is numbered by (see `text.make_vocabulary`), None for other kinds.
        left_out: paths or URLs of tars that were indexed with these and hold no sample.
        shard_starts: int64 (len(shards) + 1,), the number of each shard's first sample.
        offsets, sizes, labels, header_crcs, extensions, key_ends, keys: see `ARRAYS`; memory-mapped when loaded.
        fingerprint: SHA-256 hex of shard names (relative to their common folder), sizes and header digests.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        arrays: dict[str, NDArray[Any]],
        class_names: Sequence[str] | None = None,
        vocabulary: Sequence[str] | None = None,
        left_out: Sequence[str] = (),
        origin: tuple[Callable[..., Index], Any] | None = None,
    ) -> None:
        """`origin` is how other processes open it: a function of its second part, fingerprint and vocabulary."""
        self.shards = tuple(shards)
        self.class_names = tuple(class_names) if class_names is not None else None
        self.vocabulary = tuple(vocabulary) if vocabulary is not None else None
        self.left_out = tuple(left_out)
        self.shard_starts: NDArray[np.int64] = np.cumsum([0, *(shard.count for shard in self.shards)], dtype=np.int64)
        self.offsets, self.sizes = arrays["offsets"], arrays["sizes"]
        self.labels, self.header_crcs = arrays["labels"], arrays["header_crcs"]
        self.extensions, self.keys, self.key_ends = arrays["extensions"], arrays["keys"], arrays["key_ends"]
        self.kind = kind_of(EXTENSIONS[self.extensions[0]])
        self.any_remote = any(locations.is_remote(shard.url) for shard in self.shards)
        self.folder = locations.common_folder([shard.url for shard in self.shards])
        self.fingerprint = _fingerprint(self.shards, self.folder)
        highest = int(self.labels.max()) if len(self.labels) else -1
        self.num_classes = max(highest + 1, len(self.class_names or ())) if highest >= 0 else 0
        self._origin = origin

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_jpegs(self) -> bool:
        """Whether any sample is named as a JPEG, whose pixels depend on the decoder in their last bit."""
        return bool(np.isin(self.extensions, [EXTENSIONS.index(name) for name in ("jpg", "jpeg")]).any())

    def __reduce__(self) -> tuple[Any, ...]:
        if self._origin is not None:
            reopen, where = self._origin
            return reopen, (where, self.fingerprint, self.vocabulary)
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return Index, (self.shards, arrays, self.class_names, self.vocabulary, self.left_out)

    def with_vocabulary(self, vocabulary: Sequence[str]) -> Index:
        """The same lines of text, their characters numbered by another vocabulary."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return Index(self.shards, arrays, self.class_names, vocabulary, self.left_out)

    def with_class_names(self, class_names: Sequence[str]) -> Index:
        """The same samples, their classes named."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return Index(self.shards, arrays, class_names, self.vocabulary, self.left_out)

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard number of each sample, vectorized."""
        return np.searchsorted(self.shard_starts, samples, side="right") - 1

    def key(self, sample: int) -> str:
        """The sample's WebDataset key."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode("utf-8", "replace")

    def shard_name(self, shard: int) -> str:
        """A shard's name relative to the folder that all shards share."""
        return locations.relative_name(self.shards[shard].url, self.folder)

    def name(self, sample: int) -> str:
        """`shard:key` in printable characters, for messages."""
        shard = int(self.shard_of(np.asarray([sample]))[0])
        return printable(f"{self.shard_name(shard)}:{self.key(sample)}")

    def entry(self, sample: int) -> tuple[int, int, int, int, str]:
        """Shard number, byte offset of the data, its size, CRC-32 of its tar header, and extension."""
        shard = int(self.shard_of(np.asarray([sample]))[0])
        where = int(self.offsets[sample]), int(self.sizes[sample]), int(self.header_crcs[sample])
        return shard, *where, EXTENSIONS[self.extensions[sample]]


def kind_of(extension: str) -> str:
    """The kind of samples that have this extension, which is one of `EXTENSIONS`."""
    return next(kind for kind, extensions in KINDS.items() if extension in extensions)


def describe_gaps(labels: NDArray[np.integer]) -> tuple[str, ...]:
    """A line about classes that no sample is of, below the largest label: none is ever trained."""
    counts = np.bincount(labels[labels >= 0])
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return ()
    shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
    return (
        f"labels go up to {len(counts) - 1}, but no sample has label {shown}: a conditional run has {len(counts)} "
        "classes, and those are never trained; number the labels from 0 without gaps to leave them out",
    )


def concatenate(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The arrays of one index from those of consecutive groups of shards."""
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ARRAYS}
    bases = np.cumsum([0, *(len(part["keys"]) for part in parts[:-1])], dtype=np.int64)
    arrays["key_ends"] += np.repeat(bases, [len(part["key_ends"]) for part in parts])
    return arrays


def _fingerprint(shards: Sequence[Shard], folder: str) -> str:
    table = [[locations.relative_name(shard.url, folder), shard.size, shard.header_digest] for shard in shards]
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()
