"""Generator inputs: addressed latents and labels."""

from __future__ import annotations

import torch
from torch import Tensor

from distgan import randomness
from distgan.config import GeneratorConfig


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
