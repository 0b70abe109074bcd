"""What the players are fed, whatever reads it: the batches of one process, bit for bit."""

from __future__ import annotations

import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from distgan import schedule
from distgan.config import load_config
from distgan.data.index.loading import load_index
from distgan.distributed.runtime import Runtime
from distgan.players.objective_base import MicroBatch
from distgan.training.inputs import Feed
from distgan.training.setup import assemble
from tests.ranks import RankPool
from tests.runs import recipe

STEPS = 3


def fed(config_path: str, workers: int) -> list[tuple[Any, ...]]:
    """All fields of the micro-batches of some steps, of both players in turn, on this rank."""
    config = load_config(config_path, [f"data.num_workers={workers}"])
    index = load_index(config.data.path)
    runtime = Runtime()
    state = assemble(config, index, runtime)
    state.progress.step, state.progress.position = 2, 2 * 2 * 32
    found: list[MicroBatch] = []
    with closing(Feed(state, runtime)) as feed:
        for step in range(2, 2 + STEPS):
            for update in schedule.discriminator_updates(config, step, state.progress.position):
                found += feed.discriminator_inputs(update)
                state.progress.position += update.batch_size
            found += feed.generator_inputs(step)
    return [tuple(field.numpy() if torch.is_tensor(field) else field for field in batch) for batch in found]


@pytest.mark.parametrize("order", ["permutation", "lanes"])
def test_ranks_and_workers_feed_the_same_batches(tmp_path: Path, digits: Path, ranks: RankPool, order: str) -> None:
    lanes = {"lanes": 3, "shuffle_block": 50} if order == "lanes" else {}
    config = recipe(
        tmp_path, digits, data={"order": order, "mirror": True, "dequantize": True, "labels": True, **lanes},
        training={"batch_size": 32, "gradient_accumulation_steps": 2}, objective={"feature_matching": {}},
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
    assert len(latents.unique(dim=0)) == len(latents) == STEPS * 3 * 32
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
            training={"batch_size": 32, "gradient_accumulation_steps": 4},
            objective={"feature_matching": {}},
        )
    )
    runtime = Runtime()
    state = assemble(config, load_index(config.data.path), runtime)
    with closing(Feed(state, runtime)) as feed:
        update = next(iter(schedule.discriminator_updates(config, 0, 0)))
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
