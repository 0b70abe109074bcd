"""Latents and labels of updates to come, many updates in one draw.

A draw is some hundred small operations, and costs hardly more for a thousand rows than for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distgan.inference.latents import LatentSource

ROWS = 1024
"""As many rows as whole updates have of these, but those of one update at least, are drawn at once."""


class LatentPrefetcher:
    """What one rank's shares of micro-batches are generated from."""

    def __init__(
        self, source: LatentSource, purpose: str, share: int, micro_batch: int, accumulation: int, distance: int
    ) -> None:
        """`accumulation` micro-batches, `share` rows of each, make an update; updates begin `distance` apart."""
        self._source, self._purpose, self._share = source, purpose, share
        self._starts = [
            update * distance + number * micro_batch
            for update in range(max(1, ROWS // (share * accumulation)))
            for number in range(accumulation)
        ]
        self._drawn: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def take(self, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Addresses, latents and labels from `first` on: (share,) int64, (share, latent_size), (share,) int64 or None.

        They are taken once, micro-batch by micro-batch and update by update.
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
