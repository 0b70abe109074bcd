"""Generator inputs: addressed latents and labels, drawn ahead of time while training.

A draw launches about a hundred small operations and costs nearly the same for 1,000 rows as for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distgan import randomness
from distgan.config import GeneratorConfig

ROWS = 1024
"""Target rows per draw, rounded down to whole updates; a draw holds at least one update."""


class LatentSource:
    """Latents and labels as a pure function of (seed, purpose, position), on any device.

    Labels have the class frequencies of the data.
    """

    def __init__(
        self, config: GeneratorConfig, seed: int, *, class_counts: list[int] | None, device: torch.device | str = "cpu"
    ) -> None:
        """class_counts: samples per class; None for an unconditional generator."""
        self._config = config
        self._seed = seed
        self.device = torch.device(device)
        self._boundaries = None
        if class_counts is not None:
            self._boundaries = torch.tensor(class_counts, dtype=torch.int64, device=self.device).cumsum(0)
            self._total = sum(class_counts)

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return latents (n, latent_size) float32 and labels (n,) int64 or None, for int64 positions (n,)."""
        positions = positions.to(self.device)
        latents = draw_latents(self._config, self._seed, purpose, positions)
        if self._boundaries is None:
            return latents, None
        drawn = randomness.integers(self._seed, f"{purpose}/labels", positions, self._total)
        return latents, torch.searchsorted(self._boundaries, drawn, right=True)


def draw_latents(config: GeneratorConfig, seed: int, purpose: str, positions: Tensor) -> Tensor:
    """Return latents (n, latent_size), float32: U(-1, 1) or N(0, 1), one row per position."""
    shape = (config.latent_size,)
    if config.latent_distribution == "uniform":
        return 2.0 * randomness.uniform(seed, purpose, positions, shape) - 1.0
    return randomness.normal(seed, purpose, positions, shape)


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
