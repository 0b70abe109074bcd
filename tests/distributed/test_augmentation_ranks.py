"""Augmentation over ranks and micro-batches: the same images and the same adaptive probability, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgan.config import parse_config
from distgan.distributed.runtime import Runtime
from distgan.losses.augmentation.controller import AugmentationController
from distgan.players.objective import DiscriminatorObjective
from distgan.players.samples import MicroBatch
from tests.ranks import RankPool

BATCH, UPDATES = 8, 12


class Recorder(nn.Module):
    """D(x) = mean of x, which keeps its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append(samples.detach().clone())
        logits: Tensor = samples.mean((1, 2, 3)) + self.bias
        return logits


class Still(nn.Module):
    """G(z) = z, as an image."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents.view(-1, 3, 16, 16)


def augmented(accumulation: int, name: str) -> dict[str, Any]:
    """Images that the discriminator saw, by their address, and probabilities after each update."""
    section = {"augmentation": name, "probability": "adaptive", "controller": {"every": 3, "kimg": 0.05, "target": 0.0}}
    config = parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": 16, "kind": "latents" if "latent" in name else "images"},
            **{key: {"architecture": "r3gan"} for key in ("generator", "discriminator")},
            "objective": {"augmentation": section},
            "training": {"steps": 1, "batch_size": BATCH, "gradient_accumulation_steps": accumulation},
        }
    )
    runtime = Runtime()
    controller = AugmentationController(config.objective.augmentation.controller, runtime.device)  # type: ignore[union-attr]
    discriminator = Recorder()
    objective = DiscriminatorObjective(discriminator, Still(), config, None, controller)
    reals, fakes = torch.randn(2, UPDATES * BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(3)) + 0.02
    share = BATCH // accumulation // runtime.world_size
    images: dict[str, Tensor] = {}
    probabilities = []
    for update in range(UPDATES):
        signs = []
        for number in range(accumulation):
            first = update * BATCH + (number * runtime.world_size + runtime.rank) * share
            places = torch.arange(first, first + share)
            batch = MicroBatch(places, fakes[places].flatten(1), None, reals[places], None)
            signs.append(objective(batch, 0, update)[1]["augmentation/sign"])
            for kind, seen in zip(("real", "fake"), torch.cat(discriminator.seen).chunk(2), strict=True):
                images |= {f"{kind} {place}": image for place, image in zip(places.tolist(), seen, strict=True)}
            discriminator.seen.clear()
        controller.update(signs, torch.ones(()), index=update, images=BATCH)
        probabilities.append(controller.probability.item())
    return {"images": images, "probabilities": probabilities, "state": controller.state()}


@pytest.mark.parametrize("name", ["ada", "diffaugment", "latent_diffaugment"])
def test_ranks_and_micro_batches_do_not_matter(ranks: RankPool, name: str) -> None:
    [alone] = ranks.run(1, augmented, 1, name)
    assert len(set(alone["probabilities"])) > 2, "it moves"
    assert max(alone["probabilities"]) > 0.3
    for world_size, accumulation in ((2, 1), (1, 2), (2, 2), (4, 2)):
        found = ranks.run(world_size, augmented, accumulation, name)
        images = {key: image for one in found for key, image in one["images"].items()}
        assert images.keys() == alone["images"].keys()
        assert [key for key, image in images.items() if not torch.equal(image, alone["images"][key])] == []
        for one in found:
            assert one["probabilities"] == alone["probabilities"]
            assert all(torch.equal(one["state"][key], value) for key, value in alone["state"].items())
