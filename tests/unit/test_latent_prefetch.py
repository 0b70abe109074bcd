"""What is drawn ahead is what would be drawn at its time, in few draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from distgan.config import GeneratorConfig
from distgan.inference.latents import ROWS, LatentPrefetcher, LatentSource

UPDATES = 300


class Counted(LatentSource):
    """Counts the rows of each draw."""

    rows: Counter[int]

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        self.rows[len(positions)] += 1
        return super().draw(purpose, positions)


@pytest.mark.parametrize("counts", [None, [1, 2]])
@pytest.mark.parametrize(
    ("share", "micro_batch", "accumulation", "distance"),
    [
        (8, 16, 1, 16),
        (8, 16, 2, 32),
        (3, 6, 1, 64),  # a level whose batch does not divide the largest one, between which generator updates lie
        (3, 6, 2, 64),
        (1500, 1500, 2, 3000),  # more than is drawn at once
    ],
)
def test_all_are_drawn_once(
    share: int, micro_batch: int, accumulation: int, distance: int, counts: list[int] | None
) -> None:
    source = Counted(GeneratorConfig(latent_size=2), 5, class_counts=counts)
    source.rows = Counter()
    plain = LatentSource(GeneratorConfig(latent_size=2), 5, class_counts=counts)
    ahead = LatentPrefetcher(source, "latents", share, micro_batch, accumulation, distance)
    updates = UPDATES if share < ROWS else 3
    for update in range(7, 7 + updates):
        for number in range(accumulation):
            first = update * distance + number * micro_batch + share
            addresses, latents, labels = ahead.take(first)
            expected = plain.draw("latents", addresses)
            assert torch.equal(addresses, torch.arange(first, first + share))
            assert torch.equal(latents, expected[0])
            assert (labels is None) == (counts is None)
            assert labels is None or (expected[1] is not None and torch.equal(labels, expected[1]))
    drawn = sum(rows * times for rows, times in source.rows.items())
    assert drawn <= updates * accumulation * share + ROWS
    assert sum(source.rows.values()) <= -(-updates * accumulation * share // (ROWS // 2))
