"""Assign stream positions to several sources of data by weight, by a pure function of (seed, position).

Blocks of 64 positions hold each source in proportion: before block b, source k has its share of 64 b samples, up to a
rounding that does not grow with b. A keyed shuffle orders each block. Without it, two equal sources would alternate,
and the groups of a minibatch standard deviation, which are every m-th sample, would be of one source each.

The samples of source k before a position are counted in closed form, so that each source is read in its own order, and
nothing has to be stored or replayed to start anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distgan.randomness import words

Integers = NDArray[np.int64]
BLOCK = 64
"""Positions that are shuffled together."""
_RESOLUTION = 2**30


class Located(NamedTuple):
    """Number of the source at each position, and the position in that source's own order; int64 (n,) each."""

    sources: Integers
    positions: Integers


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return integers in the proportion of weights above 0, to 2^-31 of their sum, so that counts are exact.

    Only proportions matter: weights of 1 and 3 give the same as those of 0.25 and 0.75.
    """
    total = sum(weights)
    whole = [max(1, round(weight / total * _RESOLUTION)) for weight in weights]
    shared = math.gcd(*whole)
    return tuple(weight // shared for weight in whole)


class Mixture:
    """The assignment of positions to sources with these whole weights."""

    def __init__(self, seed: int, weights: Sequence[int]) -> None:
        self._seed, self._weights = seed, tuple(weights)
        # Larger ones first, so that roundings add up to at most 1 + 1/2 + ... + 1/(K - 1) for K sources.
        self._descending = sorted(range(len(weights)), key=lambda source: -weights[source])

    def counts(self, positions: Integers) -> Integers:
        """Return the samples of each source in the blocks before multiples of `BLOCK`, int64 (sources, n).

        The first source takes the whole part of its share, the next one its share of what is left, and so on. So no
        count ever falls, and together they are the position.
        """
        left_weight = sum(self._weights)
        # The counts repeat after so many positions, which keeps the products below within 64 bits.
        periods, rest = np.divmod(positions, left_weight)
        counts = np.empty((len(self._weights), len(positions)), np.int64)
        for source in self._descending:
            weight = self._weights[source]
            taken = rest * weight // left_weight
            counts[source] = periods * weight + taken
            rest, left_weight = rest - taken, left_weight - weight
        return counts

    def locate(self, positions: Integers) -> Located:
        """Return the source at each position, int64 (n,), and the number of its samples before that position."""
        blocks, slots = np.divmod(positions, BLOCK)
        found, rows = np.unique(blocks, return_inverse=True)
        shape = len(found), BLOCK
        before = self.counts(found * BLOCK).T
        sizes = self.counts((found + 1) * BLOCK).T - before
        # The content of each block, source by source, with each source's own positions.
        runs = sizes.ravel()
        numbers = np.repeat(np.tile(np.arange(len(self._weights)), len(found)), runs).reshape(shape)
        own = np.repeat(before.ravel() - (np.cumsum(runs) - runs), runs) + np.arange(found.size * BLOCK)
        # The slots of each block take the sources in shuffled order, and the positions of each source in rising order.
        every = torch.from_numpy((found[:, None] * BLOCK + np.arange(BLOCK)).ravel())
        drawn = words(self._seed, "data/sources", every, 1).numpy().reshape(shape)
        shuffled = np.take_along_axis(numbers, np.argsort(drawn, axis=1, kind="stable"), axis=1)
        places = np.empty(shape, np.int64)
        np.put_along_axis(places, np.argsort(shuffled, axis=1, kind="stable"), own.reshape(shape), axis=1)
        return Located(shuffled[rows, slots], places[rows, slots])
