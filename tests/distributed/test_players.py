"""The players over several ranks against one, in float64, and what a skipped update leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distgan.config import parse_config
from distgan.distributed.runtime import Runtime
from distgan.latents import LatentSource
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import SampleShape
from distgan.training.ema import AveragedGenerator
from distgan.training.player import DiscriminatorObjective, GeneratorObjective, Player
from tests.ranks import RankPool

BATCH = 8


def small_config(**training: Any) -> Any:
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": 16, "channels": 1},
            "generator": {"width": 4, "latent_size": 8},
            "discriminator": {"width": 4},
            "objective": {"adversarial": training.pop("adversarial", "non_saturating"), "r1": {"gamma": 2.0}},
            "training": {"steps": 10, "batch_size": BATCH, **training},
        }
    )


def build(config: Any, runtime: Runtime) -> tuple[Player, Player, AveragedGenerator, LatentSource]:
    shape = SampleShape(resolution=16, channels=1)
    generator = build_generator(config.generator, shape).double()
    discriminator = build_discriminator(config.discriminator, shape).double()
    average = AveragedGenerator(generator)
    players = (
        Player("generator", GeneratorObjective(generator, discriminator, config.objective, None),
               config.generator.optimizer, runtime),
        Player("discriminator", DiscriminatorObjective(discriminator, generator, config.objective, None),
               config.discriminator.optimizer, runtime),
    )  # fmt: skip
    return *players, average, LatentSource(config.generator, 0, class_counts=None)


def train_steps(steps: int, accumulation: int, nan_at: int | None = None, **training: Any) -> dict[str, Any]:
    config = small_config(accumulation=accumulation, **training)
    runtime = Runtime()
    generator, discriminator, average, source = build(config, runtime)
    everything = torch.rand(steps * BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    micro = BATCH // accumulation
    share = micro // runtime.world_size
    snapshots, losses = [], []
    for step in range(steps):
        d_batches, g_batches = [], []
        for number in range(accumulation):
            first = step * BATCH + number * micro + runtime.rank * share
            places = torch.arange(first, first + share)
            reals = 2 * everything[places] - 1
            if nan_at == step and runtime.rank == runtime.world_size - 1:
                reals = reals * torch.nan
            latents, _ = source.draw("discriminator latents", places)
            d_batches.append((reals, None, latents.double(), None, step % 2 == 0))
            latents, _ = source.draw("generator latents", places)
            g_batches.append((latents.double(), None))
        discriminator.update(d_batches, 1e-3)
        applied = generator.update(g_batches, 1e-3)
        average.update(0.9, applied.double())
        snapshots.append({k: v.clone() for k, v in discriminator.network.state_dict().items()})
        losses.append(discriminator.statistics.reduce(runtime) | generator.statistics.reduce(runtime))
    state = {f"{name}/{key}": value for name, module in
             (("g", generator.network), ("d", discriminator.network), ("ema", average.network))
             for key, value in module.state_dict().items()}  # fmt: skip
    return {
        "state": state, "losses": losses, "snapshots": snapshots, "skipped": discriminator.skipped.item(),
        "moments": discriminator.optimizer_state(),
    }  # fmt: skip


@pytest.mark.parametrize("adversarial", ["non_saturating", "minimax"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_do_not_matter(ranks: RankPool, accumulation: int, adversarial: str) -> None:
    alone, *_ = ranks.run(1, train_steps, 5, accumulation, adversarial=adversarial)
    for world_size in (2, 4):
        for found in ranks.run(world_size, train_steps, 5, accumulation, adversarial=adversarial):
            for key, value in alone["state"].items():
                torch.testing.assert_close(found["state"][key], value, rtol=1e-8, atol=1e-10, msg=key)
            for step, losses in enumerate(alone["losses"]):
                # The statistics are kept in float32.
                assert found["losses"][step] == pytest.approx(losses, rel=1e-5, abs=1e-6)


def test_gradient_accumulation_reduces_once(ranks: RankPool) -> None:
    assert ranks.run(2, count_reductions, 1) == ranks.run(2, count_reductions, 4)


def count_reductions(accumulation: int) -> int:
    """All-reduces of gradients in one generator update without batch norm."""
    runtime = Runtime()
    network = torch.nn.Linear(3, 3)

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> Any:
            loss = self.network(x).square().mean()
            return loss, {"loss": loss.detach()}

    player = Player("generator", Objective(), small_config().generator.optimizer, runtime)
    calls = 0

    def hook(_, bucket):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    player.engine.register_comm_hook(None, hook)  # type: ignore[operator]
    player.update([(torch.ones(2, 3),)] * accumulation, 1e-3)
    return calls


def test_a_skipped_update_leaves_nothing_behind(ranks: RankPool) -> None:
    """One NaN sample on one rank: no rank's discriminator moves in that step, and both stay equal afterwards."""
    first, second = ranks.run(2, train_steps, 4, 1, nan_at=2)
    for found in (first, second):
        assert found["skipped"] == 1
        assert all(torch.isfinite(value).all() for value in found["state"].values())
        assert all(torch.equal(found["snapshots"][1][k], found["snapshots"][2][k]) for k in found["snapshots"][1])
        assert not torch.equal(found["snapshots"][2]["logit.weight"], found["snapshots"][3]["logit.weight"])
        assert found["moments"]["logit.weight/step"].item() == 3
        assert "loss/discriminator" not in found["losses"][2]
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])


def test_a_skipped_generator_update_does_not_move_the_average() -> None:
    live = torch.nn.Linear(2, 2)
    average = AveragedGenerator(live)
    before = [value.clone() for value in average.network.parameters()]
    with torch.no_grad():
        live.weight += 1.0
    average.update(0.5, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(average.network.parameters(), before, strict=True))
    average.update(0.75, torch.ones(()))
    torch.testing.assert_close(average.network.weight, before[0] + 0.25)
