"""The samples of several sources in the proportion of their weights, for evaluations."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from distgan.data.index.table import ARRAYS, Index
from distgan.data.order import permute
from distgan.randomness import derive_key


def proportional_counts(index: Index) -> list[int]:
    """Return how many samples of each source are the largest choice, without repetition, in their weights' proportion.

    The source that has the fewest samples for its weight gives all of them.
    """
    total = sum(source.weight for source in index.sources)
    size = min(len(source.samples) * total // source.weight for source in index.sources)
    return [min(len(source.samples), round(size * source.weight / total)) for source in index.sources]


def in_proportion(index: Index) -> Index:
    """Return an index of the samples that stand for the mixed data in evaluations; of one source, the index itself.

    Each source gives an addressed choice of `proportional_counts`, which depends on nothing but the index. Samples are
    numbered anew. Classes are those of the whole index.
    """
    if not index.sources:
        return index
    chosen = np.concatenate([
        source.samples.start + np.sort(permute(np.arange(count), len(source.samples), derive_key(0, f"reals/{number}")))
        for number, (source, count) in enumerate(zip(index.sources, proportional_counts(index), strict=True))
    ])  # fmt: skip
    counts = np.bincount(index.shard_of(chosen), minlength=len(index.shards)).tolist()
    shards = [replace(shard, count=count) for shard, count in zip(index.shards, counts, strict=True)]
    arrays = {name: getattr(index, name)[chosen] for name in ARRAYS if name not in ("keys", "key_ends")}
    ends = index.key_ends[chosen]
    starts = np.where(chosen, index.key_ends[chosen - 1], 0)
    arrays |= {"key_ends": np.cumsum(ends - starts), "keys": index.keys[_ranges(starts, ends)]}
    kept = index.class_names, index.vocabulary, index.left_out, index.latents
    found = Index(shards, arrays, *kept, (_again, index))
    found.num_classes = index.num_classes
    found.fingerprint = hashlib.sha256(f"in proportion: {index.fingerprint}".encode()).hexdigest()
    return found


def _again(index: Index, fingerprint: str, *_: object) -> Index:
    found = in_proportion(index)
    assert found.fingerprint == fingerprint
    return found


def _ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of all ranges [start, end), one after the other."""
    sizes = ends - starts
    moved = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    ranges: NDArray[np.int64] = np.arange(len(moved)) + moved
    return ranges
