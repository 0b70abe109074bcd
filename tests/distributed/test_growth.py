"""Networks that grow over several ranks against one, in float64."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distgan import schedule
from distgan.checkpoint.compatibility import check_optimizer
from distgan.config import Config, parse_config
from distgan.distributed.parts import local_part
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.inference.latents import LatentSource
from distgan.networks import build_discriminator, build_generator
from distgan.networks.progressive import fade_reals, set_growth, shrink
from distgan.networks.shape import sample_shape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.player import Player
from distgan.players.samples import MicroBatch
from distgan.training.ema import EMAGenerator, Profiles
from distgan.training.state import Progress, TrainingState
from tests.engines import LAUNCHED, needs, stored, under, whole
from tests.ranks import RankPool

STEPS = 9


def growing_config(**growth: Any) -> Config:
    network = {"architecture": "progressive", "normalization": "none", "width": 4, "max_width": 8}
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": 8, "channels": 1},
            "generator": {**network, "latent_size": 8},
            "discriminator": {**network, "minibatch_stddev": {"group_size": 4}},
            "objective": {"adversarial": "wasserstein", "gradient_penalty": {}, "drift": 0.001},
            "training": {"steps": STEPS, "batch_size": 16},
            # Two steps of 4x4, three of a fade, two of them blends.
            "growth": {
                "stable_kimg": 0.032,
                "fade_kimg": 0.024,
                "batch_sizes": {8: 8},
                "learning_rates": {8: 2e-3},
                **growth,
            },
        }
    )


def build(config: Config) -> TrainingState:
    shape, runtime = sample_shape(config.data), Runtime()
    generator = build_generator(config.generator, shape)
    discriminator = build_discriminator(config.discriminator, shape)
    now = schedule.growth(config, 0)
    set_growth((generator, discriminator), now)
    average = EMAGenerator(generator)
    players = (
        Player(GeneratorObjective(generator, discriminator, config, None), config.generator.optimizer, runtime),
        Player(DiscriminatorObjective(discriminator, generator, config, None), config.discriminator.optimizer, runtime),
    )
    average.shard()
    index: Any = SimpleNamespace(num_classes=0, vocabulary=None, latents=None)
    state = TrainingState(config, index, *players, average, Profiles(generator, ()), Progress(), now)
    state.warm_up_buckets()
    return state


def train_step(state: TrainingState, source: LatentSource) -> None:
    config, progress, runtime = state.config, state.progress, state.generator.runtime
    assert state.growth is not None
    (update,) = schedule.discriminator_updates(config, progress.step, progress.used)
    share = update.micro_batch // runtime.world_size
    places = update.start + torch.arange(share) + runtime.rank * share
    fixed = torch.Generator().manual_seed(5)
    everything = 2 * torch.rand(STEPS * 16, 1, 8, 8, generator=fixed) - 1
    reals = fade_reals(shrink(everything[places], state.growth.resolution), state.growth.fade)
    latents, _ = source.draw("latents", places)
    batch = MicroBatch(places, latents.to(reals.dtype), None, reals, None)
    settings = {"lr": schedule.rate_at_resolution(config, progress.images) or 1e-3}
    state.discriminator.update([batch], (progress.images, update.index), settings)
    applied = state.generator.update([batch], (progress.images,), settings)
    state.average.update(0.5, applied)
    progress.step += 1
    progress.position += update.batch_size
    progress.images += update.batch_size


def grow_up(*, dtype: torch.dtype = torch.float64, **growth: Any) -> dict[str, Any]:
    torch.set_default_dtype(dtype)
    try:
        config = growing_config(**growth)
        state = build(config)
        source = LatentSource(config.generator, 0, class_counts=None)
        levels, moments, wrappers = [], [], [weakref.ref(player.engine.module) for player in state.players]
        for _ in range(STEPS):
            assert state.growth is not None
            levels.append((state.growth.level, round(24 * state.growth.fade)))
            train_step(state, source)
            state.grow()
            moments.append({name.partition(".")[0] for name in state.generator.engine.optimizer_state()})
        tensors = {
            f"{name}/{key}": value
            for name, tensors in (
                ("g", whole(state.generator.engine.weights())),
                ("d", whole(state.discriminator.engine.weights())),
                ("ema", whole({key: local_part(value) for key, value in state.average.network.state_dict().items()})),
            )
            for key, value in tensors.items()
        }
        return {
            "levels": levels,
            "tensors": tensors,
            "moments": moments,
            "old wrappers": sum(wrapper() is not None for wrapper in wrappers),
        }
    finally:
        torch.set_default_dtype(torch.float32)


def test_ranks_do_not_matter(ranks: RankPool) -> None:
    alone, *_ = ranks.run(1, grow_up)
    # Positions 0, 16, 32; then 48, 56, 64, ... with the smaller batch: 16/24 of the fade, 24/24.
    assert alone["levels"] == [(0, 24), (0, 24), (0, 24), (1, 16), (1, 24), (1, 24), (1, 24), (1, 24), (1, 24)]
    for world_size in (2, 4):
        for found in ranks.run(world_size, grow_up):
            assert found["levels"] == alone["levels"]
            # Each would reduce all gradients once more.
            assert found["old wrappers"] == 0
            for name, value in alone["tensors"].items():
                torch.testing.assert_close(found["tensors"][name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("engine", [needs("zero2"), needs("fsdp")])
def test_growth_is_the_same_under_every_engine(ranks: RankPool, engine: str) -> None:
    expected, found = (ranks.run(2, under, LAUNCHED[kind], grow_up, dtype=torch.float32)[0] for kind in ("ddp", engine))
    assert found["levels"] == expected["levels"]
    assert found["moments"] == expected["moments"]
    for name, value in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][name], value, rtol=0, atol=1e-6, msg=name)


def test_moments_are_forgotten_where_a_fade_begins_and_ends() -> None:
    everything = {"first", "blocks", "to_rgb"}
    # They are gone after the step before the fade, and after its last one.
    assert grow_up()["moments"] == [{"first", "to_rgb"}] * 2 + [set()] * 2 + [everything] * 5


def test_moments_can_be_kept() -> None:
    found = grow_up(reset_optimizers=False)["moments"]
    assert found == [{"first", "to_rgb"}] * 3 + [{"first", "blocks", "to_rgb"}] * (STEPS - 3)


def test_moments_of_parameters_that_were_met_are_whole() -> None:
    player = build(growing_config()).generator
    moments = {"to_rgb.1.bias/step": torch.ones(()), "to_rgb.1.bias/exp_avg": torch.ones(1)}
    with pytest.raises(UserError, match=r"to_rgb.1.bias/exp_avg_sq is missing"):
        check_optimizer(Path("checkpoint"), player, stored(moments))
    check_optimizer(Path("checkpoint"), player, stored(moments | {"to_rgb.1.bias/exp_avg_sq": torch.ones(1)}))
    with pytest.raises(UserError, match=r"to_rgb.9.bias/step is unknown"):
        check_optimizer(Path("checkpoint"), player, stored({"to_rgb.9.bias/step": torch.ones(())}))


def test_a_resumed_run_keeps_its_moments() -> None:
    config = growing_config()
    source = LatentSource(config.generator, 0, class_counts=None)
    state, again = build(config), build(config)
    for _ in range(4):
        train_step(state, source)
        state.grow()
    again.progress.images = state.progress.images
    again.grow()
    moments = {"to_rgb.1.bias/exp_avg": torch.ones(1)}
    again.generator.engine.load_optimizer_state(stored(moments))
    again.grow()
    assert again.growth == state.growth
    assert again.generator.engine.optimizer_state().keys() == moments.keys()
