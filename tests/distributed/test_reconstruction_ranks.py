"""An autoencoder with an adaptive weight over several ranks and engines against one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_blocks import assert_equal
from tests.distributed.test_players import BATCH, train_steps
from tests.engines import LAUNCHED, under
from tests.ranks import RankPool

STEPS = 3
DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "of patches, batch norm": {"architecture": "patchgan", "layers": 1},
    # Its blocks are sharded one by one, and two backward passes look at them.
    "of blocks": {"architecture": "r3gan", "width": 8, "max_width": 16, "depth": 1},
}


def sections(discriminator: str) -> dict[str, Any]:
    return {
        "generator": {
            "architecture": "autoencoder", "depth": 1, "downsampling": 4, "latent_size": 32,
            "latent_distribution": "normal",
        },
        "discriminator": DISCRIMINATORS[discriminator],
        "objective": {"adversarial": "hinge", "r1": None, "reconstruction": {"adversarial_start_kimg": BATCH / 1000}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "engine", "discriminator"),
    [(2, "ddp", "of patches, batch norm"), (4, "ddp", "of patches, batch norm"), (2, "fsdp", "of blocks")],
)
def test_ranks_and_engines_do_not_matter(ranks: RankPool, world_size: int, engine: str, discriminator: str) -> None:
    given = sections(discriminator)
    (alone,) = ranks.run(1, train_steps, STEPS, **given)
    found = ranks.run(world_size, under, LAUNCHED[engine], train_steps, STEPS, **given)[-1]
    assert [of["generator/adversarial_weight"] > 0 for of in alone["losses"]] == [False, True, True]
    for losses in (*alone["losses"], *found["losses"]):  # of pairs of neighbors, which one sample has none of
        losses.pop("generator/diversity", None)
        losses.pop("data/diversity", None)
    assert_equal(found, alone)
