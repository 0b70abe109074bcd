"""Means of what players report, over micro-batches, updates and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distgan.distributed.runtime import Runtime

Totals = dict[str, tuple[float, float]]


class ScalarAccumulator:
    """Means over micro-batches and ranks of what a player reports, summed on the device until asked for."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._carried: Totals = {}

    def add(self, values: Mapping[str, Tensor], applied: Tensor) -> None:
        """Add one micro-batch's 0-d values; those of a skipped update (`applied` 0) do not count."""
        names = tuple(values)
        # An applied update can still report an infinite logit, where its loss is flat. It becomes the largest number
        # while that is of float32, so that a sum of several of them in float64 is finite.
        row = torch.stack([*values.values(), applied]).nan_to_num().double()
        row = torch.where(applied > 0, row, 0.0)
        if names in self._sums:
            self._sums[names] += row
        else:
            self._sums[names] = row

    def totals(self, runtime: Runtime) -> Totals:
        """Sum and count of each value, as means over ranks; one all-reduce, and a wait for the device.

        What is added later is added to these very numbers, so that whoever carries them on comes to the same means.
        """
        totals = dict(self._carried)
        if not self._sums:
            return totals
        # By rank, because a resume may be on another number of them.
        flat = (runtime.all_reduce_sum(torch.cat(list(self._sums.values()))) / runtime.world_size).tolist()
        for names in self._sums:
            row, flat = flat[: len(names) + 1], flat[len(names) + 1 :]
            for name, value in zip(names, row, strict=False):
                total, count = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, count + row[-1]
        self.carry(totals)
        return totals

    def means(self, runtime: Runtime) -> dict[str, float]:
        """Means since the interval began, over all ranks. The interval goes on."""
        return {name: total / count for name, (total, count) in self.totals(runtime).items() if count}

    def reduce(self, runtime: Runtime) -> dict[str, float]:
        """Means since the last call, over all ranks. A new interval begins."""
        means = self.means(runtime)
        self.carry({})
        return means

    def carry(self, totals: Mapping[str, Sequence[float]]) -> None:
        """Forget what was added, and go on from the totals of an interval that was interrupted."""
        self._sums.clear()
        self._carried = {name: (total, count) for name, (total, count) in totals.items()}
