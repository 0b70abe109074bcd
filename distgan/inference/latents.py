"""Generator inputs: addressed latents and labels, drawn ahead of time while training.

A draw launches about a hundred small operations and costs nearly the same for 1,000 rows as for one.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from distgan import randomness
from distgan.config import GeneratorConfig
from distgan.errors import UserError

ROWS = 1024
"""Target rows per draw, rounded down to whole updates; a draw holds at least one update."""


class Source(Protocol):
    """What a network in evaluation mode maps to samples, by position."""

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return latents, or images to reconstruct, and labels or None, for int64 positions (n,)."""


class LatentSource:
    """Latents and labels as a pure function of (seed, purpose, position), on any device.

    Labels have the class frequencies of the data.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        seed: int,
        *,
        class_counts: list[int] | None,
        device: torch.device | str = "cpu",
        truncation: float | None = None,
    ) -> None:
        """Store what the draws are a function of.

        Args:
            class_counts: samples per class; None for an unconditional generator.
            truncation: see `truncate`; None draws from the whole distribution, as in training.

        Raises:
            UserError: the truncation is not above 0 and finite, or the latents are not normal.
        """
        if truncation is not None:
            _check_truncation(config, truncation)
        self._config = config
        self._seed = seed
        self._truncation = truncation
        self.device = torch.device(device)
        self._boundaries = None
        if class_counts is not None:
            self._boundaries = torch.tensor(class_counts, dtype=torch.int64, device=self.device).cumsum(0)
            self._total = sum(class_counts)

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return latents (n, latent_size) float32 and labels (n,) int64 or None, for int64 positions (n,)."""
        positions = positions.to(self.device)
        latents = draw_latents(self._config, self._seed, purpose, positions)
        if self._truncation is not None:
            latents = truncate(latents, self._truncation)
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


def truncate(latents: Tensor, threshold: float) -> Tensor:
    """Map draws from N(0, 1) to draws from N(0, 1) truncated to [-threshold, threshold], number by number.

    The truncation trick (Brock et al. 2019, section 3.1): numbers beyond the threshold are drawn again. In place of
    that, the distribution function of the one distribution and the inverse of the other map each draw, so that a sample
    stays itself and moves to the middle as the threshold falls. BigGAN-PyTorch scales the latents instead.

    Returns:
        Tensor of the shape and dtype of `latents`.
    """
    shares = torch.erf(latents.double() / math.sqrt(2.0)) * math.erf(threshold / math.sqrt(2.0))
    drawn = torch.erfinv(shares) * math.sqrt(2.0)
    return drawn.clamp(-threshold, threshold).to(latents.dtype)


def _check_truncation(config: GeneratorConfig, truncation: float) -> None:
    if not 0 < truncation < math.inf:
        raise UserError(f"truncation = {truncation}: expected a number above 0, such as 0.5, or none at all")
    if config.latent_distribution != "normal":
        raise UserError(
            f"truncation = {truncation}: is for latents of N(0, 1), found generator.latent_distribution = "
            f"{config.latent_distribution}; leave truncation out"
        )


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
        # On the device once, because the host would wait for each copy to it.
        self._offsets = (torch.tensor(self._starts)[:, None] + torch.arange(share)).to(source.device)
        self._drawn: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def take(self, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return addresses, latents and labels: (share,) int64, (share, latent_size), (share,) int64 or None.

        The first address is `first`. Take each micro-batch once, in order.
        """
        if first not in self._drawn:
            starts = [first + start for start in self._starts]
            addresses = first + self._offsets
            latents, labels = self._source.draw(self._purpose, addresses.flatten())
            rows = zip(
                addresses,
                latents.split(self._share),
                labels.split(self._share) if labels is not None else [None] * len(starts),
                strict=True,
            )
            self._drawn = dict(zip(starts, rows, strict=True))
        return self._drawn.pop(first)
