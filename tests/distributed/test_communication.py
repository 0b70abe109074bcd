"""What `tools/communication.py` counts of a step, against numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from distgan.config import load_config
from tests.engines import LAUNCHED, under
from tests.ranks import RankPool
from tests.runs import recipe
from tools.communication import Kind, Traffic, counted
from tools.recipe_costs import costs, sent_bytes

# 16x16, width 4. Generator: a layer from 8 latents to 8 x 4 x 4 and its norm, 8 to 4 channels and its norm, 4 to 1.
GENERATOR = 8 * 128 + 2 * 8 + 8 * 4 * 16 + 2 * 4 + (4 * 1 * 16 + 1)
# Discriminator: 1 to 4 channels, 4 to 8 and its norm, and a logit of 8 x 4 x 4.
DISCRIMINATOR = (1 * 4 * 16 + 4) + 4 * 8 * 16 + 2 * 8 + (8 * 16 + 1)
# Two float64 moments of each channel.
OF_GENERATOR, OF_DISCRIMINATOR = 2 * 8 * (8 + 4), 2 * 8 * 8


@pytest.mark.parametrize(("precision", "bytes_each"), [("float32", 4), ("bf16", 2)])
def test_a_step_of_a_small_dcgan(
    ranks: RankPool, digits: Path, tmp_path: Path, precision: str, bytes_each: int
) -> None:
    config = recipe(tmp_path, digits, objective={"r1": None}, training={"gradient_precision": precision})
    first, second = ranks.run(2, counted, str(config), [], str(tmp_path), 3)
    assert first == second
    traffic, parameters = first
    assert parameters == {"generator": GENERATOR, "discriminator": DISCRIMINATOR}
    assert {kind: amount for kind, amount in traffic.items() if kind.purpose != "readings"} == {
        # One bucket an update: two discriminator updates a step. The opponent's gradients are not sent.
        Kind("discriminator", "gradients", "allreduce"): Traffic(2, 2 * bytes_each * DISCRIMINATOR),
        Kind("generator", "gradients", "allreduce"): Traffic(1, bytes_each * GENERATOR),
        # An update: two layers of the generator forward only, then one of its own for reals and for fakes, and back.
        Kind("discriminator", "batch statistics", "allreduce"): Traffic(
            2 * (2 + 2 * 2), 2 * (OF_GENERATOR + 2 * 2 * OF_DISCRIMINATOR)
        ),
        # Both networks, forward and back.
        Kind("generator", "batch statistics", "allreduce"): Traffic(2 * 3, 2 * (OF_GENERATOR + OF_DISCRIMINATOR)),
        # Whether a rank was asked to stop, and whether it could not read a sample.
        Kind("both", "flags", "allreduce"): Traffic(1, 2 * 4),
    }


@pytest.mark.parametrize(
    ("engine", "world_size", "r1", "micro_batches"),
    [("fsdp", 2, None, 1), ("fsdp", 2, {"gamma": 1.0}, 2), ("hsdp", 4, None, 2)],
)
def test_a_step_of_blocks_sends_what_the_model_predicts(
    ranks: RankPool, digits: Path, tmp_path: Path, engine: str, world_size: int, r1: object, micro_batches: int
) -> None:
    """Reals and fakes share a pass without R1; with it, weights are gathered once for both micro-batches."""
    blocks = {"architecture": "gat", "width": 16, "depth": 4, "heads": 2, "patch_size": 4}
    training = {"critic_steps": 1, "gradient_accumulation_steps": micro_batches}
    path = recipe(
        tmp_path, digits, generator={**blocks, "latent_distribution": "normal"},
        discriminator={**blocks, "projection_size": 16}, training=training,
        objective={"adversarial": "relativistic_paired", "r1": r1},
    )  # fmt: skip
    traffic, parameters = ranks.run(world_size, under, LAUNCHED[engine], counted, str(path), [], str(tmp_path), 2)[0]
    config = load_config(path)
    predicted = sent_bytes(config, costs(config, 10))

    def sent(role: str, collective: str) -> float:
        return sum(
            amount.bytes
            for kind, amount in traffic.items()
            if (kind.player, kind.collective) == (role, collective)
            and kind.purpose in ("gradients", "weights")
        )  # fmt: skip

    for role, bytes_ in predicted.items():
        assert sent(role, "allgather_base") == pytest.approx(bytes_["weights"], rel=0.01)
        assert sent(role, "reduce_scatter_base") == pytest.approx(bytes_["gradients"], rel=0.01)
        # Between two replicas, half of the gradients each, and once per update.
        exchanged = 4 * parameters[role] / 2 if engine == "hsdp" else 0
        assert sent(role, "allreduce") == pytest.approx(exchanged, rel=0.01)
