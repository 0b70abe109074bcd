"""The players over several ranks against one, in float64, and what a skipped update leaves behind."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from distgan.config import Config, parse_config
from distgan.distributed.parts import local_part
from distgan.distributed.runtime import Runtime
from distgan.inference.latents import LatentSource
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.virtual_batch_norm import set_reference, uses_reference
from distgan.networks.shape import sample_shape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.objective_base import Objective
from distgan.players.player import Player
from distgan.players.samples import MicroBatch
from distgan.schedule import optimizer_settings
from distgan.training.ema import EMAGenerator
from distgan.training.setup import prepare_passes
from tests.engines import whole
from tests.ranks import RankPool

BATCH = 8
CLASSES = 3


def small_config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "run_dir": "unused",
        "data": {"path": "unused", "resolution": 16, "channels": 1},
        "generator": {"width": 4, "latent_size": 8},
        "discriminator": {"width": 4},
        "objective": {"r1": {"gamma": 2.0, "every": 2}},
        "training": {"steps": 10, "batch_size": BATCH},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_config(values)


def build(config: Config, runtime: Runtime, dtype: torch.dtype) -> tuple[Player, Player, EMAGenerator, LatentSource]:
    shape = sample_shape(config.data, num_classes=CLASSES)
    generator = build_generator(config.generator, shape).to(dtype)
    discriminator = build_discriminator(config.discriminator, shape).to(dtype)
    fixed = torch.Generator().manual_seed(11)
    for network in (generator, discriminator):
        if uses_reference(network):
            samples = torch.rand(network.get_buffer("reference").shape, generator=fixed, dtype=dtype)
            set_reference(network, samples, torch.arange(len(samples)) % CLASSES if config.data.labels else None)
    average = EMAGenerator(generator)
    for role, network in (("generator", generator), ("discriminator", discriminator)):
        prepare_passes(role, network, config)
    autocast = torch.bfloat16 if config.training.mixed_precision == "bf16" else None
    players = (
        Player(GeneratorObjective(generator, discriminator, config, autocast), config.generator.optimizer, runtime),
        Player(
            DiscriminatorObjective(discriminator, generator, config, autocast),
            config.discriminator.optimizer,
            runtime,
            clipping=config.objective.weight_clipping,
        ),
    )
    average.shard()
    return *players, average, LatentSource(config.generator, 0, class_counts=[1] * CLASSES)


def whole_state(generator: Player, discriminator: Player, average: EMAGenerator) -> dict[str, torch.Tensor]:
    """Copies of all that updates change, but for the optimizers' moments."""
    named = {
        "g": whole(generator.engine.weights()), "d": whole(discriminator.engine.weights()),
        "ema": whole({name: local_part(value) for name, value in average.network.state_dict().items()}),
        **{player.role: player.history.state() for player in (generator, discriminator) if player.history is not None},
    }  # fmt: skip
    return {f"{name}/{key}": value.clone() for name, tensors in named.items() for key, value in tensors.items()}


def train_steps(
    steps: int, nan_at: int | None = None, dtype: torch.dtype = torch.float64, **sections: Any
) -> dict[str, Any]:
    config = small_config(**sections)
    runtime = Runtime(gradients_in_bf16=config.training.gradient_precision == "bf16")
    generator, discriminator, average, source = build(config, runtime, dtype)
    everything = torch.rand(steps * BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(5), dtype=dtype)
    micro = config.micro_batch
    share = micro // runtime.world_size
    snapshots, losses = [], []
    for step in range(steps):
        batches: dict[str, list[MicroBatch]] = {"discriminator": [], "generator": []}
        for number in range(config.training.gradient_accumulation_steps):
            first = step * BATCH + number * micro + runtime.rank * share
            places = torch.arange(first, first + share)
            reals = 2 * everything[places] - 1
            if nan_at == step and runtime.rank == runtime.world_size - 1:
                reals = reals * torch.nan
            for role, micro_batches in batches.items():
                latents, labels = source.draw(f"{role} latents", places)
                labels = labels if config.data.labels else None
                real_labels = places % CLASSES if config.data.labels else None
                micro_batches.append(MicroBatch(places, latents.to(dtype), labels, reals, real_labels))
        images = step * BATCH
        settings = [
            optimizer_settings(player.optimizer, step, images, 1) | {"lr": 1e-3}
            for player in (config.discriminator, config.generator)
        ]
        discriminator.update(batches["discriminator"], (images, step), settings[0])
        applied = generator.update(batches["generator"], (images, step), settings[1])
        average.update(0.9, applied.to(dtype))
        snapshots.append(whole_state(generator, discriminator, average))
        losses.append(discriminator.statistics.reduce(runtime) | generator.statistics.reduce(runtime))
    return {
        "state": snapshots[-1], "losses": losses, "snapshots": snapshots, "skipped": discriminator.skipped.item(),
        "generator_skipped": generator.skipped.item(),
        "moments": whole(discriminator.engine.optimizer_state()),
    }  # fmt: skip


GAT = {"architecture": "gat", "width": 16, "depth": 4, "heads": 2, "patch_size": 4}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "non-saturating": {},
    "minimax, accumulated": {"objective": {"adversarial": "minimax"}, "training": {"gradient_accumulation_steps": 2}},
    "relativistic average": {"objective": {"adversarial": "relativistic_average"}},
    "relativistic paired of classes, R1 and R2": {
        "objective": {"adversarial": "relativistic_paired", "r1": {"gamma": 1.0}, "r2": {"gamma": 1.0}},
        "discriminator": {"normalization": "none"},
        "data": {"labels": True},
    },
    "GAT of classes, augmented": {
        "generator": {**GAT, "latent_distribution": "normal"},
        "discriminator": {**GAT, "projection_size": 16},
        "objective": {
            "adversarial": "relativistic_paired",
            "r1": {"gamma": 1.0, "method": "finite_difference", "antithetic": False},
            "r2": {"gamma": 1.0},
            "augmentation": {"augmentation": "diffaugment"},
        },
        "data": {"labels": True},
    },
    "gradients scaled down": {
        "generator": {"optimizer": {"name": "torch.optim:SGD", "max_gradient_norm": 0.1}},
        "discriminator": {"optimizer": {"name": "torch.optim:SGD", "max_gradient_norm": 0.1}},
    },
    "finite differences of some samples, augmented": {
        "objective": {
            "r1": {"gamma": 1.0, "method": "finite_difference", "antithetic": False, "fraction": 0.5},
            "r2": {"gamma": 1.0, "method": "finite_difference", "draws": 2},
            "augmentation": {"augmentation": "diffaugment"},
        },
        "discriminator": {"normalization": "none"},
    },
    "finite differences with batch statistics": {
        "objective": {"r1": {"gamma": 1.0, "method": "finite_difference"}},
    },
    "WGAN with clipping": {
        "objective": {"adversarial": "wasserstein", "r1": None, "weight_clipping": {"limit": 0.01}},
        "generator": {"optimizer": {"name": "rmsprop"}},
        "discriminator": {"optimizer": {"name": "rmsprop"}},
    },
    "WGAN-GP of classes": {
        "objective": {"adversarial": "wasserstein", "r1": None, "gradient_penalty": {}, "drift": 0.01},
        "discriminator": {"normalization": "none"},
        "data": {"labels": True},
    },
    "DRAGAN": {
        "objective": {"r1": None, "gradient_penalty": {"points": "uniform"}},
        "discriminator": {"normalization": "none"},
    },
    "noisy targets, instance noise": {
        "objective": {
            "label_smoothing": {"real": [0.7, 1.0], "flip": 0.2},
            "instance_noise": {"sigma": {"start": 0.3, "end": 0, "over": 6 * BATCH / 1000}},
        }
    },
    "ADA with R1 and R2": {
        "objective": {
            "augmentation": {"augmentation": "ada", "probability": 0.6, "frequency_filter": 1, "noise": 1, "cutout": 1},
            "r1": {"gamma": 1.0}, "r2": {"gamma": 1.0},
        },
        "discriminator": {"normalization": "none"},
    },
    "DiffAugment, penalty at augmented samples": {
        "objective": {
            "augmentation": {"augmentation": "diffaugment", "penalties": "augmented"}, "r1": None,
            "gradient_penalty": {"points": "uniform"},
        },
        "discriminator": {"normalization": "none"},
    },
    "feature matching": {"objective": {"feature_matching": {"adversarial": True}}},
    "historical averaging": {"objective": {"historical_averaging": {"generator": 0.1, "discriminator": 0.1}}},
    "virtual batch norm": {
        "generator": {"normalization": "virtual"}, "discriminator": {"normalization": "virtual"}
    },
    "hinge, spectral norm": {
        "objective": {"adversarial": "hinge", "r1": None},
        "generator": {"spectral_norm": True},
        "discriminator": {"spectral_norm": True, "normalization": "none"},
        "data": {"labels": True},
    },
    "StyleGAN2 of classes, mixed styles, path length": {
        "generator": {
            "architecture": "stylegan2", "latent_distribution": "normal", "style_size": 8, "mapping_layers": 2
        },
        "discriminator": {"architecture": "stylegan2", "minibatch_stddev": {"group_size": 4}},
        "objective": {"terms": [{"term": "path_length", "weight": 2, "every": 2}]},
        "data": {"labels": True},
    },
    "samples compared": {
        "discriminator": {
            "minibatch_discrimination": {"kernels": 3, "dimensions": 2}, "minibatch_stddev": {"group_size": 4}
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_ranks_do_not_matter(ranks: RankPool, technique: str) -> None:
    sections = TECHNIQUES[technique]
    alone, *_ = ranks.run(1, train_steps, 5, **sections)
    for world_size in (2, 4):
        for found in ranks.run(world_size, train_steps, 5, **sections):
            for key, value in alone["state"].items():
                torch.testing.assert_close(found["state"][key], value, rtol=1e-8, atol=1e-10, msg=key)
            for step, losses in enumerate(alone["losses"]):
                # The statistics are kept in float32.
                # One sample has no neighbor that it could differ from.
                alike = {name: value for name, value in losses.items() if name in found["losses"][step]}
                assert losses.keys() - alike.keys() <= {"generator/diversity", "data/diversity"}
                assert found["losses"][step] == pytest.approx(alike, rel=1e-5, abs=1e-6)


def accumulated(micro_batches: int) -> dict[str, Any]:
    """Two steps without batch norm, whose micro-batches are then parts of one batch."""
    sections = {"generator": {"normalization": "none"}, "discriminator": {"normalization": "none"}}
    return train_steps(2, training={"gradient_accumulation_steps": micro_batches}, **sections)


def test_accumulated_gradients_are_those_of_the_whole_batch(ranks: RankPool) -> None:
    [whole], [parts] = ranks.run(1, accumulated, 1), ranks.run(1, accumulated, 4)
    # Adam's steps do not feel a constant factor, but its moments and the reported norms do.
    for kind in ("state", "moments"):
        for key, value in whole[kind].items():
            torch.testing.assert_close(parts[kind][key], value, rtol=1e-8, atol=1e-12, msg=key)
    for one, other in zip(whole["losses"], parts["losses"], strict=True):
        norms = [key for key in one if key.startswith("gradient_norm/")]
        assert len(norms) == 2
        assert [other[key] for key in norms] == pytest.approx([one[key] for key in norms], rel=1e-6)


def test_gradient_accumulation_reduces_once(ranks: RankPool) -> None:
    assert ranks.run(2, count_reductions, 1) == ranks.run(2, count_reductions, 4)


def count_reductions(accumulation: int) -> int:
    """All-reduces of gradients in one generator update without batch norm."""
    runtime = Runtime()
    network = torch.nn.Linear(3, 3)

    class Square(Objective):
        role = "generator"

        def forward(self, x: torch.Tensor) -> Any:
            loss = self.network(x).square().mean()
            return loss, {"loss": loss.detach()}

    config = small_config(training={"gradient_accumulation_steps": accumulation})
    player = Player(Square(network, torch.nn.Identity(), config, None), config.generator.optimizer, runtime)
    calls = 0

    def hook(_, bucket):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    player.engine.module.register_comm_hook(None, hook)  # type: ignore[operator]
    player.update([torch.ones(2, 3)] * accumulation, (), {"lr": 1e-3})
    return calls


@pytest.mark.parametrize("role", ["discriminator", "generator"])
def test_micro_batches_are_let_go_before_the_next_is_drawn(role: str) -> None:
    """The device never holds the data of more than one micro-batch, of whichever player."""
    config = small_config(training={"gradient_accumulation_steps": 4})
    generator, discriminator, _, source = build(config, Runtime(), torch.float64)
    player = {"discriminator": discriminator, "generator": generator}[role]
    drawn: list[weakref.ref[torch.Tensor]] = []

    def draw(number: int) -> MicroBatch:
        assert not any(reals() is not None for reals in drawn), number
        places = torch.arange(number * 2, number * 2 + 2)
        latents, _ = source.draw("latents", places)
        reals = torch.rand(2, 1, 16, 16, dtype=torch.float64)
        drawn.append(weakref.ref(reals))
        return MicroBatch(places, latents.double(), None, reals, None)

    assert player.update(map(draw, range(4)), (0, 0) if role == "discriminator" else (0,), {"lr": 1e-3}) == 1
    assert len(drawn) == 4


def test_a_skipped_update_leaves_nothing_behind(ranks: RankPool) -> None:
    """One NaN sample on one rank: no rank's discriminator moves in that step, and both stay equal afterwards."""
    first, second = ranks.run(2, train_steps, 4, nan_at=2)
    for found in (first, second):
        assert found["skipped"] == 1
        assert all(torch.isfinite(value).all() for value in found["state"].values())
        before, skipped, after = found["snapshots"][1:4]
        assert all(torch.equal(before[key], skipped[key]) for key in before if key.startswith("d/"))
        assert not torch.equal(skipped["d/logit.weight"], after["d/logit.weight"])
        assert found["moments"]["logit.weight/step"].item() == 3
        assert "loss/discriminator" not in found["losses"][2]
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])


def test_a_skipped_generator_update_does_not_move_the_average() -> None:
    live = torch.nn.Linear(2, 2)
    average = EMAGenerator(live)
    before = [value.clone() for value in average.network.parameters()]
    with torch.no_grad():
        live.weight += 1.0
    average.update(0.5, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(average.network.parameters(), before, strict=True))
    average.update(0.75, torch.ones(()))
    torch.testing.assert_close(average.network.weight, before[0] + 0.25)


def test_a_step_that_both_players_skip_leaves_the_whole_state_as_it_was(ranks: RankPool) -> None:
    """Relativistic losses show the NaN to the generator too. Vectors of spectral norm move in a forward pass itself."""
    averaging = {"generator": 0.1, "discriminator": 0.1}
    found, _ = ranks.run(
        2, train_steps, 4, nan_at=2,
        generator={"spectral_norm": True}, discriminator={"spectral_norm": True, "normalization": "none"},
        objective={"adversarial": "relativistic_average", "historical_averaging": averaging},
    )  # fmt: skip
    assert found["skipped"] == found["generator_skipped"] == 1
    before, skipped, after = found["snapshots"][1:4]
    assert {name.split("/")[0] for name in before} == {"g", "d", "ema", "generator", "discriminator"}
    assert [key for key in before if not torch.equal(before[key], skipped[key])] == []
    moved = [key for key in before if not torch.equal(skipped[key], after[key])]
    assert {key[0] for key in moved if key.startswith(("g/", "d/")) and key.endswith((".u", ".v"))} == {"g", "d"}
    vectors = [key for key in after if key.startswith("g/") and key.endswith((".u", ".v"))]
    assert all(torch.equal(after[key], after[key.replace("g/", "ema/")]) for key in vectors)
