"""Train a discriminator against a fixed generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distgan.config import Config, parse_config
from distgan.distributed.runtime import Runtime
from distgan.players.objective import DiscriminatorObjective
from distgan.players.player import Player
from distgan.players.samples import MicroBatch
from distgan.schedule import optimizer_settings, run_images


class Given(nn.Module):
    """Generator that returns its latents, because the theory only needs a distribution to draw from."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents


class Discriminator(nn.Module):
    """Discriminator of points (n, dimensions) that returns logits (n,). It is smooth, as the optimum is."""

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
    """Return the config of a run on points, with the given optimizer of the discriminator and objective."""
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
    """Training of a float64 discriminator with the objective and optimizer of `config`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.runtime = Runtime()
        self.network = Discriminator(config.data.dimensions).double()
        objective = DiscriminatorObjective(self.network, Given(), config, None)
        clipping = config.objective.weight_clipping
        self.player = Player(objective, config.discriminator.optimizer, self.runtime, clipping=clipping)
        self.updates = 0

    def update(self, reals: Tensor, fakes: Tensor) -> None:
        """Update the discriminator once. `reals` and `fakes` have the shape (n, dimensions)."""
        length = run_images(self.config)
        images = self.updates * len(reals)
        settings = optimizer_settings(self.config.discriminator.optimizer, self.updates, images, length)
        addresses = self.updates * len(reals) + torch.arange(len(reals))
        reals, fakes, addresses = (tensor.to(self.runtime.device) for tensor in (reals, fakes, addresses))
        self.player.update([MicroBatch(addresses, fakes, None, reals, None)], (images, self.updates), settings)
        self.updates += 1

    def report(self) -> dict[str, float]:
        """Return the scalars that a run would write, as means over the updates since the last call."""
        return self.player.statistics.reduce(self.runtime)
