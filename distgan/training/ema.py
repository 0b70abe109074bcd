"""Exponential moving average (EMA) of the generator's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distgan.networks.moving import moving_buffers


class EMAGenerator:
    """Copy of the generator that holds the EMA weights. Evaluation, sampling and export use this copy.

    Buffers are not averaged. Batch-norm statistics are recomputed from addressed latents before each use. Other buffers
    that training changes, such as spectral-norm vectors, are copied from the live generator. Create this object before
    an engine takes the generator's weights.
    """

    def __init__(self, generator: nn.Module) -> None:
        self.network = copy.deepcopy(generator).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self.network.parameters())
        self._generator = generator
        self.decay = 0.0
        """Decay of the last update."""

    @torch.no_grad()
    def update(self, decay: float, applied: Tensor) -> None:
        """average += (1 - decay) * applied * (live - average), where `applied` is 1, or 0 for a skipped update.

        Call it inside `Runtime.full_params(generator)`, because sharded weights must be gathered first.
        """
        self.decay = decay
        averages, buffers = moving_buffers(self.network), moving_buffers(self._generator)
        if averages:
            torch._foreach_copy_(averages, buffers)
        live: list[Tensor] = list(self._generator.parameters())
        if decay == 0.0:
            torch._foreach_copy_(self._averages, live)
            return
        change = torch._foreach_sub(live, self._averages)
        torch._foreach_mul_(change, (1.0 - decay) * applied)
        torch._foreach_add_(self._averages, change)
