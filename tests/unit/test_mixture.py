"""Several sources mixed by weight: counts follow the weights, and a position alone decides about its sample."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distgan.data.mixture import BLOCK, Mixture, whole_weights

seeds = st.integers(0, 2**63 - 1)
weight_lists = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)
SLACK = 2.0**-28
"""Weights are rounded to 2^-30 of their sum."""


def harmonic(number: int) -> float:
    return sum(1 / i for i in range(1, number + 1))


@given(weights=weight_lists, blocks=st.lists(st.integers(0, 2**20), min_size=1, max_size=8))
@settings(deadline=None)
def test_counts_before_a_block_follow_the_weights(weights: list[float], blocks: list[int]) -> None:
    positions = np.array(sorted(blocks)) * BLOCK
    counts = Mixture(0, whole_weights(weights)).counts(positions)
    expected = np.outer(np.array(weights) / sum(weights), positions)
    drift = SLACK * positions.max() + 1e-6
    assert np.array_equal(counts.sum(0), positions)
    assert (counts > expected - 1 - drift).all()
    assert (counts < expected + harmonic(len(weights) - 1) + drift).all()
    assert (np.diff(counts, axis=1) >= 0).all()


@given(weights=weight_lists, seed=seeds, blocks=st.integers(1, 12))
@settings(deadline=None)
def test_all_prefixes_follow_the_weights_and_sources_are_read_without_gaps(
    weights: list[float], seed: int, blocks: int
) -> None:
    length = blocks * BLOCK
    sources, places = Mixture(seed, whole_weights(weights)).locate(np.arange(length))
    shares = np.array(weights) / sum(weights)
    for source, share in enumerate(shares):
        assert places[sources == source].tolist() == list(range(int((sources == source).sum())))
        seen = np.concatenate(([0], np.cumsum(sources == source)))
        deviation = np.abs(seen - share * np.arange(length + 1)).max()
        # In a block, the order of its 64 positions is free: at worst, all samples of the source come first or last.
        assert deviation < harmonic(len(weights) - 1) + 1 + BLOCK * share * (1 - share) + 1


@given(weights=weight_lists, seed=seeds, start=st.integers(0, 2**40), count=st.integers(1, 300))
@settings(deadline=None)
def test_a_position_alone_decides(weights: list[float], seed: int, start: int, count: int) -> None:
    mixture = Mixture(seed, whole_weights(weights))
    positions = np.arange(start, start + count)
    whole = mixture.locate(positions)
    shuffled = np.random.default_rng(seed % 2**32).permutation(count)
    scattered = mixture.locate(positions[shuffled])
    assert np.array_equal(scattered.sources, whole.sources[shuffled])
    assert np.array_equal(scattered.positions, whole.positions[shuffled])
    assert [int(part[0]) for part in mixture.locate(positions[-1:])] == [int(part[-1]) for part in whole]


def test_sources_of_equal_weight_do_not_alternate() -> None:
    """Two equal sources: neighbors are of one source with probability 31/63 in a block, and of each kind as often."""
    sources = Mixture(3, (1, 1)).locate(np.arange(2**16)).sources
    assert (sources.reshape(-1, BLOCK).sum(1) == BLOCK // 2).all()
    pairs = sources.reshape(-1, 2)
    assert abs((pairs[:, 0] == pairs[:, 1]).mean() - 31 / 63) < 4 * (0.25 / len(pairs)) ** 0.5
    # Every 16th sample of a batch of 64 makes one group of a minibatch standard deviation.
    groups = sources.reshape(-1, 4, 16).sum(1)
    assert set(np.unique(groups)) == {0, 1, 2, 3, 4}


def test_seeds_shuffle_differently_and_keep_the_counts() -> None:
    first, second = (Mixture(seed, (3, 1)).locate(np.arange(6400)).sources for seed in (0, 1))
    assert np.bincount(first).tolist() == np.bincount(second).tolist() == [4800, 1600]
    # Two independent shuffles agree at a position with probability 0.75^2 + 0.25^2.
    assert abs((first == second).mean() - 0.625) < 0.03


def test_only_proportions_of_the_weights_matter() -> None:
    assert whole_weights([1, 3]) == whole_weights([0.25, 0.75]) == (1, 3)
    assert whole_weights([2, 2, 2]) == (1, 1, 1)
    for weights in itertools.permutations([0.7, 0.2, 0.1]):
        whole = np.array(whole_weights(weights))
        assert np.abs(whole / whole.sum() - weights).max() < SLACK


def test_positions_of_a_very_long_run() -> None:
    """At position 2^52 the products would overflow without the periods; the exact integers say the same."""
    weights = whole_weights([0.7, 0.2, 0.1])
    position = 2**52
    left, rest = sum(weights), position
    expected = []
    for weight in weights:  # they descend
        expected.append(rest * weight // left)
        rest, left = rest - expected[-1], left - weight
    assert Mixture(0, weights).counts(np.array([position]))[:, 0].tolist() == expected
