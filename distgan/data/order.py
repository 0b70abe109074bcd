"""Map stream positions to samples by pure functions of (seed, epoch, place), for any world size.

Position `P` is place `P % N` of epoch `P // N`. An epoch holds each of the N samples exactly once. Of several sources
that are mixed by weight, each has an order and epochs of its own: see `MixedOrder`. Two orders:

- `Permutation` is uniform over all samples. Use it for local data, or for remote data that fits into the cache.
- `Lanes` permutes the shards, concatenates them and cuts the result into V contiguous lanes that are read in parallel.
  Each lane is read from front to back, with a shuffle inside blocks. Few shards are needed at a time, and neighboring
  ranks, and so the ranks of one node, share lanes. A batch of B samples mixes V places of the concatenated data. Over
  shards sorted by class, the variance of class counts per batch is B / V times that of a uniform shuffle. Shuffle when
  packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distgan.config import DataConfig
from distgan.data.index.table import Index
from distgan.data.mixture import Integers, Located, Mixture
from distgan.randomness import derive_key

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


class Order(Protocol):
    """An endless sequence of samples, addressed by position."""

    def samples(self, positions: Integers) -> Integers:
        """Return the sample at each position, int64 (n,). Positions may span epochs."""
        ...

    def residues(self, positions: Integers) -> Integers:
        """Return a number per position, int64 (n,). Positions of near numbers read the same shards."""
        ...

    def locate(self, positions: Integers) -> Located:
        """Return the source of each position, and the position in that source's own order."""
        ...


def assign(order: Order, positions: Integers, world_size: int) -> Integers:
    """Assign a micro-batch's positions to ranks: shape (world_size, len(positions) // world_size).

    Neighboring ranks, and so the ranks of a node, get positions of near residues.
    """
    return positions[np.argsort(order.residues(positions), kind="stable")].reshape(world_size, -1)


def make_order(config: DataConfig, seed: int, index: Index) -> Order:
    """Create the order that `data.order` names, of each source of the index."""
    if not index.sources:
        return _order_of(config, seed, index.shard_starts)
    orders = []
    for number, source in enumerate(index.sources):
        starts = index.shard_starts[source.shards.start : source.shards.stop + 1] - source.samples.start
        orders.append(_order_of(config, derive_key(seed, f"data/source/{number}"), starts))
    return MixedOrder(seed, orders, index)


def _order_of(config: DataConfig, seed: int, shard_starts: Integers) -> Order:
    if config.order == "permutation":
        return Permutation(seed, int(shard_starts[-1]))
    return Lanes(seed, shard_starts, lanes=config.lanes, block=config.shuffle_block)


def trace(index: Index, order: Order, positions: Integers) -> list[dict[str, Any]]:
    """Return one JSON-serializable object per position: shard, key, position, epoch, sample.

    Of several sources, `source` is the number of one, and `epoch` counts its own epochs.
    """
    samples, located = order.samples(positions), order.locate(positions)
    lengths = [len(source.samples) for source in index.sources] or [len(index)]
    columns = positions, samples, index.shard_of(samples), located.sources, located.positions
    return [
        {
            "shard": index.shard_name(shard),
            "key": index.key(sample),
            "position": position,
            "epoch": place // lengths[source],
            "sample": sample,
            **({"source": source} if index.sources else {}),
        }
        for position, sample, shard, source, place in zip(*(column.tolist() for column in columns), strict=True)
    ]


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit words bijectively (finalizer of SplitMix64, Steele et al., OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permute(places: Integers, sizes: Integers | int, keys: NDArray[np.uint64] | int) -> Integers:
    """Evaluate a keyed pseudo-random permutation of range(size) at each place, without a table.

    Uses an alternating Feistel network on Z_a x Z_b with a * b >= size, and walks its cycles until the result lies in
    the range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). As a and b are close to the
    square root of the size, nearly every place takes one pass.

    Args:
        places: int64, each in [0, size).
        sizes: below 2^52; a scalar, or one per place.
        keys: a scalar, or one per place.
    """
    sizes, keys = (
        np.broadcast_to(np.asarray(sizes, np.int64), places.shape),
        np.broadcast_to(_words(keys), places.shape),
    )
    rows = np.sqrt(sizes).astype(np.int64)
    rows += rows * rows < sizes
    columns = -(-sizes // np.maximum(rows, 1))
    permuted = _feistel(places, rows, columns, keys)
    outside = np.flatnonzero(permuted >= sizes)
    while len(outside):
        walked = _feistel(permuted[outside], rows[outside], columns[outside], keys[outside])
        permuted[outside] = walked
        outside = outside[walked >= sizes[outside]]
    return permuted


def _feistel(places: Integers, rows: Integers, columns: Integers, keys: NDArray[np.uint64]) -> Integers:
    left, right = (half.astype(np.uint64) for half in np.divmod(places, columns))
    heights, widths = rows.astype(np.uint64), columns.astype(np.uint64)
    for number in range(_ROUNDS):
        round_keys = keys + np.uint64(_GOLDEN * (number + 1) & _MASK)
        if number % 2:
            right = (right + mix(left ^ round_keys) % widths) % widths
        else:
            left = (left + mix(right ^ round_keys) % heights) % heights
    return (left * widths + right).astype(np.int64)


def _words(keys: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    return np.asarray(keys, np.uint64)


class Permutation:
    """One keyed permutation of all samples per epoch."""

    def __init__(self, seed: int, length: int) -> None:
        self._seed, self._length = seed, length

    def samples(self, positions: Integers) -> Integers:
        epochs, places = np.divmod(positions, self._length)
        found, numbers = np.unique(epochs, return_inverse=True)
        keys = _words([derive_key(self._seed, f"data/permutation/{epoch}") for epoch in found])  # type: ignore[arg-type]
        return permute(places, self._length, keys[numbers])

    def residues(self, positions: Integers) -> Integers:
        return np.zeros_like(positions)

    def locate(self, positions: Integers) -> Located:
        return Located(np.zeros_like(positions), positions)


@dataclass(frozen=True)
class _Epoch:
    shards: Integers
    """Shard numbers in the order of concatenation."""
    starts: Integers
    """Offset of each shard's first sample in the concatenated samples."""
    lanes: Integers
    """Lane that each residue reads."""
    key: int


class Lanes:
    """V contiguous lanes over permuted shards. Place p is row p // V of the lane that residue p % V reads.

    With N = q V + r, the first r lanes have q + 1 samples. Every epoch permutes the lanes among residues of equal
    length. The r long lanes therefore stay with the first r residues, which have q + 1 rows.
    """

    def __init__(self, seed: int, shard_starts: Integers, *, lanes: int, block: int) -> None:
        self._seed, self._shard_starts = seed, shard_starts
        self._lanes, self._block = lanes, block
        self._length = int(shard_starts[-1])
        self._epochs: dict[int, _Epoch] = {}

    def samples(self, positions: Integers) -> Integers:
        epochs, places = np.divmod(positions, self._length)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            samples[chosen] = self._samples(self._epoch(epoch), places[chosen])
        return samples

    def residues(self, positions: Integers) -> Integers:
        return positions % self._length % self._lanes

    def locate(self, positions: Integers) -> Located:
        return Located(np.zeros_like(positions), positions)

    def _samples(self, epoch: _Epoch, places: Integers) -> Integers:
        short, extra = divmod(self._length, self._lanes)
        rows, residues = np.divmod(places, self._lanes)
        lanes = epoch.lanes[residues]
        blocks, rows_in_block = np.divmod(rows, self._block)
        sizes = np.minimum(self._block, short + (lanes < extra) - blocks * self._block)
        block_keys = mix(mix(lanes.astype(np.uint64) + np.uint64(epoch.key)) + blocks.astype(np.uint64))
        shuffled = blocks * self._block + permute(rows_in_block, sizes, block_keys)
        laid_out = lanes * short + np.minimum(lanes, extra) + shuffled
        slots = np.searchsorted(epoch.starts, laid_out, side="right") - 1
        return self._shard_starts[epoch.shards[slots]] + laid_out - epoch.starts[slots]

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            found = self._lay_out(derive_key(self._seed, f"data/lanes/{epoch}"))
            # Create a new dictionary because the prefetch thread may be reading the old one.
            self._epochs = dict(list(self._epochs.items())[-3:]) | {epoch: found}
        return found

    def _lay_out(self, key: int) -> _Epoch:
        counts = np.diff(self._shard_starts)
        shards = permute(np.arange(len(counts)), len(counts), key)
        starts = np.concatenate(([0], np.cumsum(counts[shards])[:-1]))
        extra = self._length % self._lanes
        long_lanes = permute(np.arange(extra), extra, key ^ 1)
        short_lanes = extra + permute(np.arange(self._lanes - extra), self._lanes - extra, key ^ 2)
        return _Epoch(shards, starts, np.concatenate((long_lanes, short_lanes)), key)


class MixedOrder:
    """Several sources, mixed by weight: `Mixture` assigns the positions, and each source is read in its own order."""

    def __init__(self, seed: int, orders: Sequence[Order], index: Index) -> None:
        self._orders, self._sources = tuple(orders), index.sources
        self._mixture = Mixture(seed, [source.weight for source in index.sources])

    def samples(self, positions: Integers) -> Integers:
        samples = np.empty_like(positions)
        for chosen, source, order, own in self._parts(positions):
            samples[chosen] = self._sources[source].samples.start + order.samples(own)
        return samples

    def residues(self, positions: Integers) -> Integers:
        residues = np.empty_like(positions)
        for chosen, _, order, own in self._parts(positions):
            residues[chosen] = order.residues(own)
        return residues

    def locate(self, positions: Integers) -> Located:
        return self._mixture.locate(positions)

    def _parts(self, positions: Integers) -> Iterator[tuple[NDArray[np.bool_], int, Order, Integers]]:
        """Yield, per source: where its positions are, its number, its order, and the positions in that order."""
        located = self._mixture.locate(positions)
        for source in np.unique(located.sources).tolist():
            chosen = located.sources == source
            yield chosen, source, self._orders[source], located.positions[chosen]
