"""Train a discriminator against a fixed generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distgan.config import Config, parse_config
from distgan.distributed.runtime import Runtime
from distgan.players.objective import DiscriminatorObjective, MicroBatch
from distgan.players.player import Player
from distgan.schedule import learning_rate


class Given(nn.Module):
    """A generator whose samples are its latents: a density to draw from is all that the theory needs of one."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents


class Discriminator(nn.Module):
    """Points (n, dimensions) to logits (n,): three layers of 64, smooth, so that they can follow a smooth optimum."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Linear(dimensions, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
            self.layers = nn.Sequential(*layers)

    def forward(self, points: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.layers(points)
        return logits.squeeze(1)


def configure(dimensions: int, steps: int, batch_size: int, optimizer: dict[str, Any], **objective: Any) -> Config:
    """A run on points with that optimizer and objective for the discriminator."""
    return parse_config(
        {
            "run_dir": "none",
            "data": {"kind": "points", "path": "none", "dimensions": dimensions},
            "generator": {"architecture": "mlp", "latent_size": dimensions, "normalization": "none"},
            "discriminator": {"architecture": "mlp", "normalization": "none", "optimizer": optimizer},
            "objective": objective,
            "training": {"steps": steps, "batch_size": batch_size},
        }
    )


class Trial:
    """A discriminator in float64 in the course of its training."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.runtime = Runtime()
        self.network = Discriminator(config.data.dimensions).double()
        objective = DiscriminatorObjective(self.network, Given(), config, None)
        clipping = config.objective.weight_clipping
        self.player = Player(objective, config.discriminator.optimizer, self.runtime, clipping=clipping)
        self.updates = 0

    def update(self, reals: Tensor, fakes: Tensor) -> None:
        """One update, on as many real as generated points, (n, dimensions) each."""
        rate = learning_rate(self.config.discriminator.optimizer, self.updates, self.config.training.steps)
        addresses = self.updates * len(reals) + torch.arange(len(reals))
        reals, fakes, addresses = (tensor.to(self.runtime.device) for tensor in (reals, fakes, addresses))
        self.player.update([MicroBatch(addresses, fakes, None, reals, None)], (self.updates, self.updates), rate)
        self.updates += 1

    def report(self) -> dict[str, float]:
        """Means, since the last call, of what a run would write to its curves."""
        return self.player.statistics.reduce(self.runtime)
