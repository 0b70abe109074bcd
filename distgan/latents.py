"""What generators are fed, and what they make: addressed latents and labels in, 8-bit images out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distgan import randomness
from distgan.config import Config, GeneratorConfig


class LatentSource:
    """Latents and labels as a pure function of (seed, purpose, position), on any device.

    Labels follow the data's own class frequencies.
    """

    def __init__(
        self, config: GeneratorConfig, seed: int, *, class_counts: list[int] | None, device: torch.device | str = "cpu"
    ) -> None:
        """class_counts: samples of each class, or None for an unconditional generator."""
        self._config = config
        self._seed = seed
        self._device = torch.device(device)
        self._boundaries = None
        if class_counts is not None:
            self._boundaries = torch.tensor(class_counts, dtype=torch.int64, device=self._device).cumsum(0)
            self._total = sum(class_counts)

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents (n, latent_size) float32 and labels (n,) int64 or None, for int64 positions (n,)."""
        positions = positions.to(self._device)
        latents = draw_latents(self._config, self._seed, purpose, positions)
        if self._boundaries is None:
            return latents, None
        drawn = randomness.integers(self._seed, f"{purpose}/labels", positions, self._total)
        return latents, torch.searchsorted(self._boundaries, drawn, right=True)


def draw_latents(config: GeneratorConfig, seed: int, purpose: str, positions: Tensor) -> Tensor:
    """Latents (n, latent_size), float32: U(-1, 1) or N(0, 1), one row a position."""
    shape = (config.latent_size,)
    if config.latent_distribution == "uniform":
        return 2.0 * randomness.uniform(seed, purpose, positions, shape) - 1.0
    return randomness.normal(seed, purpose, positions, shape)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 by rounding to the nearest level, as metrics and pictures expect."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def statistics_batches(
    source: LatentSource, config: Config, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's share of the addressed batches from which batch-norm statistics are recomputed.

    The batches are the same for any number of ranks.
    """
    samples, batch_size = config.ema.statistics_samples, config.evaluation.batch_size
    for batch in range(rank, max(1, samples // batch_size), world_size):
        yield source.draw("batch statistics", torch.arange(batch * batch_size, (batch + 1) * batch_size))


@torch.no_grad()
def generate(network: nn.Module, source: LatentSource, purpose: str, positions: Tensor) -> Tensor:
    """Images (n, C, R, R), uint8, of a network in evaluation mode."""
    latents, labels = source.draw(purpose, positions)
    return to_bytes(network(latents, labels))
