"""Discriminator objective that runs gradient penalties in bfloat16. Training runs them in float32."""

from __future__ import annotations

from torch import Tensor

from distgan.distributed.collectives import at_least_float32
from distgan.players.objective import DiscriminatorObjective
from distgan.players.objective_base import Judged, MicroBatch


class HalfPrecisionPenalties(DiscriminatorObjective):
    """`DiscriminatorObjective` with gradient penalties in bfloat16. Use it only for measurements."""

    def _judge(
        self,
        samples: Tensor,
        labels: Tensor | None,
        kind: str | None,
        batch: MicroBatch,
        *,
        differentiable: bool = False,
    ) -> Judged:
        if differentiable:
            samples = samples.detach().requires_grad_(True)
        with self._autocast(samples):
            return Judged(samples, at_least_float32(self.network.forward(samples, labels)), {})
