"""Prefetching of latents and labels: one draw serves many updates.

A draw launches about a hundred small operations and costs nearly the same for 1,000 rows as for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distgan.inference.latents import LatentSource

ROWS = 1024
"""Target rows per draw, rounded down to whole updates; a draw holds at least one update."""


class LatentPrefetcher:
    """Draws the latents and labels of one rank's part of each micro-batch."""

    def __init__(
        self, source: LatentSource, purpose: str, share: int, micro_batch: int, accumulation: int, distance: int
    ) -> None:
        """Store the layout of the addresses.

        Args:
            share: rows of this rank per micro-batch.
            micro_batch: rows of all ranks per micro-batch.
            accumulation: micro-batches per update.
            distance: addresses between the starts of two updates.
        """
        self._source, self._purpose, self._share = source, purpose, share
        self._starts = [
            update * distance + number * micro_batch
            for update in range(max(1, ROWS // (share * accumulation)))
            for number in range(accumulation)
        ]
        self._drawn: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def take(self, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return addresses, latents and labels: (share,) int64, (share, latent_size), (share,) int64 or None.

        The first address is `first`. Take each micro-batch once, in order.
        """
        if first not in self._drawn:
            starts = [first + start for start in self._starts]
            addresses = torch.tensor(starts)[:, None] + torch.arange(self._share)
            addresses = addresses.to(self._source.device)
            latents, labels = self._source.draw(self._purpose, addresses.flatten())
            rows = zip(
                addresses,
                latents.split(self._share),
                labels.split(self._share) if labels is not None else [None] * len(starts),
                strict=True,
            )
            self._drawn = dict(zip(starts, rows, strict=True))
        return self._drawn.pop(first)
