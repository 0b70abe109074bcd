"""Check that an untrusted index is valid and that it lists all shards in its folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distgan.config.data import DataPath, paths_of
from distgan.data.index.table import EXTENSIONS, MAX_CLASSES, Index, Shard, kind_of
from distgan.data.kinds import text
from distgan.data.kinds.latents import StoredLatents
from distgan.data.storage import locations, patterns
from distgan.data.storage.tar import BLOCK

_MAX_SAMPLES = 1 << 40


def find_problem(
    shards: Sequence[Shard],
    arrays: Mapping[str, NDArray[Any]],
    class_names: Sequence[str] | None,
    vocabulary: Sequence[str] | None,
    latents: StoredLatents | None = None,
) -> str | None:
    """Return the first problem of an index, or None. No entry may point outside its shard."""
    total = sum(shard.count for shard in shards)
    if not shards or total > _MAX_SAMPLES:
        return "it lists no shards" if not shards else f"found {total:,} samples, expected at most {_MAX_SAMPLES:,}"
    if any(shard.size >= 1 << 60 for shard in shards):
        return "a shard size is out of range"
    if len({shard.url for shard in shards}) < len(shards):
        return "it lists a shard twice"
    for name, array in arrays.items():
        if name != "keys" and len(array) != total:
            return f"{name!r} has {len(array):,} entries, expected {total:,} (one per sample)"
    offsets, sizes, labels, key_ends = (arrays[name] for name in ("offsets", "sizes", "labels", "key_ends"))
    counts = np.array([shard.count for shard in shards], np.int64)
    limits = np.repeat(np.array([shard.size for shard in shards], np.int64), counts)
    if (offsets < BLOCK).any() or (offsets % BLOCK).any() or (sizes < 0).any() or (offsets > limits - sizes).any():
        return "a sample lies outside its shard"
    starts, spans = arrays["span_starts"], arrays["span_sizes"]
    if (starts < 0).any() or (starts % BLOCK).any() or (spans < BLOCK).any() or (starts > limits - spans).any():
        return "the members of a sample lie outside its shard"
    # A file and a hard link to it share an offset.
    same = (np.diff(offsets) == 0) & (np.diff(arrays["header_crcs"].astype(np.int64)) == 0) & (np.diff(sizes) == 0)
    rising = (np.diff(offsets) > 0) | same
    rising[np.cumsum(counts)[:-1] - 1] = True
    if not rising.all():
        return "offsets decrease within a shard"
    if key_ends[0] < 0 or (np.diff(key_ends) < 0).any() or key_ends[-1] != len(arrays["keys"]):
        return "a key lies outside the key table"
    first, last = int(arrays["extensions"].min()), int(arrays["extensions"].max())
    if last >= len(EXTENSIONS) or kind_of(EXTENSIONS[first]) != kind_of(EXTENSIONS[last]):
        return "an extension is unknown or of another kind than the others"
    if (vocabulary is not None) != (kind_of(EXTENSIONS[first]) == "text"):
        return "a text index needs a vocabulary, and other kinds must not have one"
    if vocabulary is not None and (problem := text.find_problem(vocabulary)):
        return problem
    if (latents is not None) != (kind_of(EXTENSIONS[first]) == "latents"):
        return "an index of latents needs their shape, shift and scale, and other kinds must not have them"
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < -1 or highest >= MAX_CLASSES or lowest < 0 <= highest:
        return "labels are out of range, or missing for some samples"
    if class_names is not None and (highest < 0 or not highest < len(class_names) <= MAX_CLASSES):
        return f"found {len(class_names)} class names, expected at least {highest + 1} (labels go up to {highest})"
    return None


def unlisted(path: DataPath, index: Index) -> tuple[str, ...]:
    """Return a line per local folder of `data.path` with tars that its index does not list."""
    listed = {*(shard.url for shard in index.shards), *index.left_out}
    lines = []
    for folder in map(locations.normalize, paths_of(path)):
        tars: list[str] = []
        with contextlib.suppress(OSError):  # not a local folder, or a folder that cannot be listed
            tars = [tar for tar in patterns.tars_in(folder) if tar not in listed]
        if tars:
            lines.append(
                f"{folder}: the index does not list {len(tars):,} tars in this folder, such as "
                f"{os.path.basename(tars[0])!r}; run `distgan index` to include them"
            )
    return tuple(lines)
