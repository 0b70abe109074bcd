"""The exponential moving average of the generator's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distgan.networks.layers.spectral_norm import power_iteration_vectors


class EMAGenerator:
    """A copy of the generator whose parameters follow the live ones. It is what is evaluated, sampled and exported.

    Buffers are not averaged: batch-norm statistics are recomputed from addressed latents before each use, and the
    vectors of spectral norm are the live generator's. Make it before an engine takes the generator's weights.
    """

    def __init__(self, generator: nn.Module) -> None:
        self.network = copy.deepcopy(generator).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self.network.parameters())
        self._generator = generator
        self.decay = 0.0
        """Of the last update."""

    @torch.no_grad()
    def update(self, decay: float, applied: Tensor) -> None:
        """average += (1 - decay) * applied * (live - average), where `applied` is 1, or 0 for a skipped update.

        The generator's weights must be whole here (`Runtime.whole`).
        """
        self.decay = decay
        # Anew each time, because an engine may put other tensors in their place.
        averages, vectors = power_iteration_vectors(self.network), power_iteration_vectors(self._generator)
        if averages:
            torch._foreach_copy_(averages, vectors)
        live: list[Tensor] = list(self._generator.parameters())
        if decay == 0.0:
            torch._foreach_copy_(self._averages, live)
            return
        change = torch._foreach_sub(live, self._averages)
        torch._foreach_mul_(change, (1.0 - decay) * applied)
        torch._foreach_add_(self._averages, change)
