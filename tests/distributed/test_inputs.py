"""What the players are fed, whatever reads it: the batches of one process, bit for bit."""

from __future__ import annotations

import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distgan import schedule
from distgan.config import load_config
from distgan.data.index.loading import load_index
from distgan.data.order import make_order
from distgan.data.reader import read_samples
from distgan.distributed.runtime import Runtime
from distgan.inference.generation import to_network
from distgan.players.samples import MicroBatch
from distgan.training.inputs import Feed
from distgan.training.setup import assemble
from distgan.training.trace import trace
from tests.ranks import RankPool
from tests.runs import recipe

STEPS = 3


def fed(config_path: str, workers: int) -> list[tuple[Any, ...]]:
    """The fields of the micro-batches of some steps, of both players in turn, on this rank; those that are there."""
    config = load_config(config_path, [f"data.num_workers={workers}"])
    index = load_index(config.data.path)
    runtime = Runtime()
    state = assemble(config, index, runtime)
    progress = state.progress
    progress.step, (progress.position, progress.images) = 2, schedule.used_after(config, 2)
    found: list[MicroBatch] = []
    with closing(Feed(state, runtime)) as feed:
        for step in range(2, 2 + STEPS):
            for update in schedule.discriminator_updates(config, step, schedule.used_after(config, step)):
                found += feed.discriminator_inputs(update)
            found += feed.generator_inputs(step)
    return [tuple(field.numpy() for field in batch if torch.is_tensor(field)) for batch in found]


@pytest.mark.parametrize(("order", "generators"), [("permutation", 32), ("lanes", 48)])
def test_ranks_and_workers_feed_the_same_batches(
    tmp_path: Path, digits: Path, ranks: RankPool, order: str, generators: int
) -> None:
    lanes = {"lanes": 3, "shuffle_block": 50} if order == "lanes" else {}
    config = recipe(
        tmp_path, digits, data={"order": order, "mirror": True, "dequantize": True, "labels": True, **lanes},
        training={"batch_size": 32, "generator_batch_size": generators, "gradient_accumulation_steps": 2},
        objective={"feature_matching": {}},
    )  # fmt: skip

    def together(world_size: int, workers: int) -> list[list[torch.Tensor]]:
        by_rank = ranks.run(world_size, fed, str(config), workers)
        assert all(len(batches) == STEPS * 3 * 2 for batches in by_rank)
        return [
            [torch.cat([torch.from_numpy(share) for share in field]) for field in zip(*shares, strict=True)]
            for shares in zip(*by_rank, strict=True)
        ]

    expected = together(1, 0)
    latents = torch.cat([MicroBatch(*batch).latents for batch in expected])
    assert len(latents.unique(dim=0)) == len(latents) == STEPS * (2 * 32 + generators)
    assert [len(MicroBatch(*batch).reals) for batch in expected] == ([16] * 4 + [generators // 2] * 2) * STEPS
    for world_size, workers in ((1, 3), (2, 0), (2, 1), (4, 0), (4, 3)):
        for number, (batch, alone) in enumerate(zip(together(world_size, workers), expected, strict=True)):
            for field, one in zip(batch, alone, strict=True):
                assert torch.equal(field, one), (world_size, workers, number)


def test_the_feed_keeps_no_micro_batch_on_the_device(tmp_path: Path, digits: Path) -> None:
    """Although the generator looks at the reals of the discriminator's update again."""
    config = load_config(
        recipe(
            tmp_path,
            digits,
            training={"batch_size": 32, "gradient_accumulation_steps": 4, "generator_reals": "last"},
            objective={"feature_matching": {}},
        )
    )
    runtime = Runtime()
    state = assemble(config, load_index(config.data.path), runtime)
    with closing(Feed(state, runtime)) as feed:
        update = next(iter(schedule.discriminator_updates(config, 0, schedule.Used(0, 0))))
        seen = []
        for inputs in (feed.discriminator_inputs(update), feed.generator_inputs(0)):
            drawn: list[weakref.ref[torch.Tensor]] = []
            for _ in range(4):
                assert not any(reals() is not None for reals in drawn)
                reals = next(inputs).reals
                assert reals is not None
                drawn.append(weakref.ref(reals))
                seen.append(reals.sum().item())
                del reals
        assert seen[:4] == seen[4:]


@pytest.mark.parametrize(("reals", "batch"), [("own", 8), ("own", 20), ("last", 8)])
def test_the_reals_of_both_players_are_those_of_the_trace(tmp_path: Path, digits: Path, reals: str, batch: int) -> None:
    """The generator's own follow those of the step's last discriminator update; no position is skipped or repeated."""
    config = load_config(
        recipe(
            tmp_path, digits,
            training={"batch_size": 8, "generator_batch_size": batch, "critic_steps": 2, "generator_reals": reals},
            objective={"adversarial": "relativistic_paired"},
        )
    )  # fmt: skip
    index = load_index(config.data.path)
    records = list(trace(config, 0, 3))
    assert [record["position"] for record in records] == list(range(len(records)))
    players = ["discriminator"] * 16 + ["generator"] * (batch if reals == "own" else 0)
    assert [record["player"] for record in records] == players * 3
    assert [record["update"] for record in records if record["player"] == "generator"][::batch] == [0, 1, 2][
        : len(players) - 16
    ]
    runtime = Runtime()
    state = assemble(config, index, runtime)
    with closing(Feed(state, runtime)) as feed:
        for step in range(3):
            expected = {player: [] for player in ("discriminator", "generator")}
            for record in records:
                if record["step"] == step:
                    expected[record["player"]].append(record["position"])
            expected["generator"] = expected["generator"] or expected["discriminator"][-8:]
            updates = list(schedule.discriminator_updates(config, step, schedule.used_after(config, step)))
            fed = {
                "discriminator": [batch for update in updates for batch in feed.discriminator_inputs(update)],
                "generator": list(feed.generator_inputs(step)),
            }
            order = make_order(config.data, config.seed, index)
            for player, batches in fed.items():
                samples = read_samples(config.data, index, order.samples(np.array(expected[player])))
                shown = torch.cat([batch.reals for batch in batches])
                assert torch.equal(shown, to_network(state.shape, samples.data)), (step, player)
            assert [batch.addresses.tolist() for batch in fed["discriminator"]] == [
                list(range(16 * step + first, 16 * step + first + 8)) for first in (0, 8)
            ]


def test_the_generator_gets_the_latents_of_the_last_discriminator_update_again(
    tmp_path: Path, digits: Path, ranks: RankPool
) -> None:
    config = recipe(
        tmp_path, digits, data={"labels": True},
        training={"batch_size": 32, "gradient_accumulation_steps": 2, "generator_latents": "last"},
    )  # fmt: skip
    for world_size in (1, 2):
        for batches in ranks.run(world_size, fed, str(config), 0):
            drawn = [batch[:3] for batch in batches]
            updates = [drawn[first : first + 2] for first in range(0, len(drawn), 2)]
            assert len(updates) == STEPS * 3
            for step in range(STEPS):
                other, last, generators = updates[3 * step : 3 * step + 3]
                for one, another, third in zip(generators, last, other, strict=True):
                    assert all(np.array_equal(*pair) for pair in zip(one, another, strict=True))
                    assert not np.array_equal(one[1], third[1])
