"""Both orders: each sample once an epoch, the same for any world size, and as well mixed as they say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgan.data.order import Lanes, Order, Permutation, assign, permute

seeds = st.integers(0, 2**63 - 1)
ragged = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def lanes_over(counts: list[int], lanes: int, block: int, seed: int = 0) -> Lanes:
    return Lanes(seed, np.cumsum([0, *counts], dtype=np.int64), lanes=lanes, block=block)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permute_is_a_bijection_of_any_size(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(2**20, 2**45), key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**20 - 200))
@settings(deadline=None)
def test_permute_stays_inside_large_ranges_without_collisions(size: int, key: int, start: int) -> None:
    permuted = permute(np.arange(start, start + 200), size, key)
    assert len(np.unique(permuted)) == 200
    assert permuted.min() >= 0
    assert permuted.max() < size


def test_permute_takes_each_place_on_its_own() -> None:
    sizes, keys = np.array([7, 1, 1000, 7]), np.array([1, 2, 3, 4], np.uint64)
    together = permute(np.array([3, 0, 500, 3]), sizes, keys)
    alone = [permute(np.array([p]), int(n), int(k))[0] for p, n, k in zip([3, 0, 500, 3], sizes, keys, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [3, 4])
def test_small_permutations_are_all_equally_likely(size: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 12_000)
    seen = Counter(tuple(permute(np.arange(size), size, int(key)).tolist()) for key in keys)
    possible = {3: 6, 4: 24}[size]
    expected = len(keys) / possible
    assert len(seen) == possible
    chi_squared = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_squared < possible - 1 + 5 * np.sqrt(2 * (possible - 1))


@given(counts=ragged, lanes=st.integers(1, 40), block=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 5))
@settings(deadline=None)
def test_each_sample_comes_once_an_epoch(counts: list[int], lanes: int, block: int, seed: int, epoch: int) -> None:
    length = sum(counts)
    positions = np.arange(epoch * length, (epoch + 1) * length)
    orders: list[Order] = [Permutation(seed, length), lanes_over(counts, lanes, block, seed)]
    for order in orders:
        assert np.array_equal(np.sort(order.samples(positions)), np.arange(length))


@given(
    counts=ragged,
    lanes=st.integers(1, 20),
    share=st.integers(1, 5),
    world_size=st.integers(1, 6),
    start=st.integers(0, 500),
)
@settings(deadline=None)
def test_ranks_share_a_batch_evenly_whatever_epochs_it_spans(
    counts: list[int], lanes: int, share: int, world_size: int, start: int
) -> None:
    positions = np.arange(start, start + share * world_size)
    for order in (Permutation(1, sum(counts)), lanes_over(counts, lanes, 8)):
        assigned = assign(order, positions, world_size)
        assert assigned.shape == (world_size, share)
        assert np.array_equal(np.sort(assigned.ravel()), positions)
        whole = order.samples(positions)
        for of_rank in assigned:
            assert np.array_equal(order.samples(of_rank), whole[of_rank - start])


def test_orders_differ_between_epochs_seeds_and_purposes() -> None:
    length = 1000
    for make in (lambda seed: Permutation(seed, length), lambda seed: lanes_over([100] * 10, 8, 64, seed)):
        first = make(0).samples(np.arange(length))
        for other in (make(0).samples(np.arange(length, 2 * length)), make(1).samples(np.arange(length))):
            assert np.mean(first == other) < 0.02


def test_an_order_is_a_function_of_the_position_alone() -> None:
    for make in (lambda: Permutation(3, 100), lambda: lanes_over([30, 30, 40], 7, 8, 3)):
        whole = make().samples(np.arange(1000))
        scattered = np.random.default_rng(0).integers(0, 1000, 300)
        order = make()
        assert np.array_equal(order.samples(scattered), whole[scattered])
        assert [int(order.samples(np.array([p]))[0]) for p in (999, 0, 500)] == whole[[999, 0, 500]].tolist()


def test_lanes_are_contiguous_stretches_of_the_permuted_shards() -> None:
    """N = 103 in 4 lanes: three of 26 samples at residues 0 to 2, one of 25; by hand from the definition."""
    counts = [10, 20, 3, 40, 30]
    order = lanes_over(counts, 4, 5)
    starts = np.cumsum([0, *counts])
    for epoch in range(3):
        samples = order.samples(np.arange(epoch * 103, (epoch + 1) * 103))
        lengths = [len(samples[residue::4]) for residue in range(4)]
        assert lengths == [26, 26, 26, 25]
        seen_shards = []
        for residue in range(4):
            lane = samples[residue::4]
            blocks = [np.sort(lane[row : row + 5]) for row in range(0, len(lane), 5)]
            shards = [sorted({int(np.searchsorted(starts, s, side="right")) for s in block}) for block in blocks]
            # A block holds what is contiguous where shards are laid end to end: at most one step within each shard.
            for block, touched in zip(blocks, shards, strict=True):
                of = np.searchsorted(starts, block, side="right")
                assert all(np.ptp(block[of == shard]) == (of == shard).sum() - 1 for shard in touched)
            seen_shards.append(shards)
        assert {shard for lane in seen_shards for block in lane for shard in block} == {1, 2, 3, 4, 5}


def test_residues_read_other_lanes_each_epoch() -> None:
    """One shard of 43 in 4 lanes: 11, 11, 11 and 10 samples, so only the last residue always reads the same lane."""
    order = lanes_over([43], 4, 5)
    lanes = [[int(order.samples(np.array([43 * epoch + r]))[0]) // 11 for r in range(4)] for epoch in range(50)]
    assert {lane[3] for lane in lanes} == {3}
    assert len({tuple(lane) for lane in lanes}) == 6
    even = lanes_over([40], 4, 5)
    assert len({int(even.samples(np.array([40 * epoch]))[0]) // 10 for epoch in range(50)}) == 4


def test_nodes_that_divide_the_lanes_read_each_shard_on_one_node() -> None:
    """16 lanes over 64 equal shards: each of 4 nodes (8 ranks) reads 16 shards of an epoch that no other reads."""
    order = lanes_over([64] * 64, 16, 32)
    shards_of_rank: dict[int, set[int]] = {rank: set() for rank in range(8)}
    for first in range(0, 64 * 64, 32):
        for rank, positions in enumerate(assign(order, np.arange(first, first + 32), 8)):
            shards_of_rank[rank] |= set((order.samples(positions) // 64).tolist())
    nodes = [shards_of_rank[2 * node] | shards_of_rank[2 * node + 1] for node in range(4)]
    assert [len(node) for node in nodes] == [16] * 4
    assert len(set().union(*nodes)) == 64


def dispersion(order: Order, classes: np.ndarray, batch: int, epochs: int) -> float:
    """Variance of class counts in batches over that of a uniform shuffle (hypergeometric); 1 is a uniform shuffle."""
    length = len(classes)
    numbers = int(classes.max()) + 1
    drawn = classes[order.samples(np.arange(epochs * length // batch * batch))].reshape(-1, batch)
    counts = np.stack([(drawn == c).sum(1) for c in range(numbers)])
    p = np.bincount(classes)[:, None] / length
    variance = batch * p * (1 - p) * (length - batch) / (length - 1)
    return float(((counts - batch * p) ** 2 / variance).mean())


def test_class_counts_of_batches_are_those_of_a_uniform_shuffle() -> None:
    """50 shards sorted by class, 10 classes. With 3,120 batches and 10 counts each, of which 9 are free, the ratio
    of a true uniform shuffle has a standard deviation near sqrt(2 / (3120 * 9)) = 0.0085."""
    classes = np.repeat(np.arange(10), 1000)
    ratio = dispersion(Permutation(0, 10_000), classes, batch=64, epochs=20)
    assert abs(ratio - 1) < 0.04
    shuffled = np.random.default_rng(0).permutation(classes)
    starts = lanes_over([200] * 50, 16, 256)
    assert abs(dispersion(starts, shuffled, batch=64, epochs=20) - 1) < 0.04


def test_lanes_over_class_sorted_shards_clump_as_documented() -> None:
    """A batch of 64 takes 4 samples from each of 16 blocks of one class: 16 draws that count 4 times, so 4 times the
    variance (a little less, as 16 of 500 shards are drawn without replacement, and where a block spans two shards)."""
    classes = np.repeat(np.arange(10), 1000)
    ratio = dispersion(lanes_over([20] * 500, 16, 4), classes, batch=64, epochs=20)
    assert 3.4 < ratio < 4.2
