"""Means of the players' scalars over micro-batches, updates and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distgan.distributed.runtime import Runtime

Totals = dict[str, tuple[float, float]]


class ScalarAccumulator:
    """Accumulates a player's scalars on the device and averages them over micro-batches and ranks on request."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._carried: Totals = {}

    def add(self, values: Mapping[str, Tensor], applied: Tensor) -> None:
        """Add the 0-d values of one micro-batch. Values of a skipped update (`applied` 0) do not count."""
        names = tuple(values)
        # An applied update can still report an infinite logit where its loss is flat. Clamp it to the largest float32,
        # so that a float64 sum of several of them is finite.
        row = torch.stack([*values.values(), applied]).nan_to_num().double()
        row = torch.where(applied > 0, row, 0.0)
        if names in self._sums:
            self._sums[names] += row
        else:
            self._sums[names] = row

    def totals(self, runtime: Runtime) -> Totals:
        """Return sum and count of each value, averaged over ranks. Collective: call on every rank.

        It costs one all-reduce and a wait for the device. Later values are added to the returned numbers, so that a
        run resumed from them reports the same means.
        """
        totals = dict(self._carried)
        if not self._sums:
            return totals
        # Stored per rank, because a resume may use another number of ranks.
        flat = (runtime.all_reduce_sum(torch.cat(list(self._sums.values()))) / runtime.world_size).tolist()
        for names in self._sums:
            row, flat = flat[: len(names) + 1], flat[len(names) + 1 :]
            for name, value in zip(names, row, strict=False):
                total, count = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, count + row[-1]
        self.carry(totals)
        return totals

    def means(self, runtime: Runtime) -> dict[str, float]:
        """Return the means since the interval began, over all ranks, and keep the interval open."""
        return {name: total / count for name, (total, count) in self.totals(runtime).items() if count}

    def reduce(self, runtime: Runtime) -> dict[str, float]:
        """Return the means since the interval began, over all ranks, and start a new interval."""
        means = self.means(runtime)
        self.carry({})
        return means

    def carry(self, totals: Mapping[str, Sequence[float]]) -> None:
        """Discard all values, and continue from the totals of an interrupted interval."""
        self._sums.clear()
        self._carried = {name: (total, count) for name, (total, count) in totals.items()}
