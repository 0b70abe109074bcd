"""Networks sharded by block: the same run as one process, whatever penalties, recomputation and replicas there are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from distgan.distributed.blocks import checkpoint_activations, declared_blocks
from distgan.distributed.engines.zero import _import_deepspeed
from distgan.distributed.parts import local
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.networks import build_discriminator
from distgan.networks.shape import sample_shape
from distgan.training.setup import prepare_passes
from tests.distributed.test_players import GAT, build, small_config, train_steps, whole_state
from tests.engines import LAUNCHED, needs, under
from tests.ranks import RankPool

STEPS = 2
TRANSFORMERS: dict[str, Any] = {
    "generator": {**GAT, "latent_distribution": "normal"},
    "discriminator": {**GAT, "projection_size": 16},
    "data": {"labels": True},
}
DIFFERENCES = {"gamma": 1.0, "method": "finite_difference"}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {"r1": None},
    "finite differences": {"r1": {**DIFFERENCES, "antithetic": False}, "r2": DIFFERENCES},
    "exact, one of them lazy": {"r1": {"gamma": 1.0}, "r2": {"gamma": 1.0, "every": 2}},
    "both kinds": {"r1": {"gamma": 1.0, "every": 2}, "r2": DIFFERENCES},
}


def sections(penalty: str, **training: Any) -> dict[str, Any]:
    objective = {"adversarial": "relativistic_paired", **PENALTIES[penalty]}
    return {**TRANSFORMERS, "objective": objective, "training": training}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All weights, and averages, to 1e-12; a bias without a gradient moves by its rounding."""
    assert found["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        torch.testing.assert_close(found["state"][key], value, rtol=1e-12, atol=1e-12, msg=key)
    for one, other in zip(found["losses"], expected["losses"], strict=True):
        # A rank with a single sample has no diversity.
        wanted = {key: value for key, value in other.items() if key in one or not key.endswith("/diversity")}
        assert one == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> Callable[..., dict[str, Any]]:
    """What one process makes of each penalty."""

    @cache
    def get(penalty: str, accumulation: int = 1) -> dict[str, Any]:
        given = sections(penalty, gradient_accumulation_steps=accumulation)
        found: dict[str, Any] = ranks.run(1, train_steps, STEPS, **given)[0]
        return found

    return get


CHECKPOINTED = {"activation_checkpointing": True}
WAYS: list[tuple[int, dict[str, str], str, dict[str, Any]]] = [
    (2, LAUNCHED["fsdp"], "finite differences", {}),
    (2, LAUNCHED["fsdp"], "exact, one of them lazy", {}),
    (2, LAUNCHED["fsdp"], "both kinds", CHECKPOINTED),
    (2, LAUNCHED["fsdp"], "none", CHECKPOINTED | {"gradient_accumulation_steps": 2}),
    (4, LAUNCHED["fsdp"], "both kinds", {}),
    (4, LAUNCHED["hsdp"], "finite differences", {}),
    (4, LAUNCHED["hsdp"], "exact, one of them lazy", CHECKPOINTED),
    (4, LAUNCHED["hsdp"], "none", {"gradient_accumulation_steps": 2}),
    (2, LAUNCHED["ddp"], "both kinds", CHECKPOINTED),
    (1, {}, "both kinds", CHECKPOINTED),
]


@pytest.mark.parametrize(("world_size", "launched", "penalty", "training"), WAYS)
def test_blocks_are_one_process_without_them(
    ranks: RankPool, alone: Any, world_size: int, launched: dict[str, str], penalty: str, training: dict[str, Any]
) -> None:
    """Sharded, replicated and recomputed: gradient norms too, which a sum over all ranks of replicas would double."""
    accumulation = training.get("gradient_accumulation_steps", 1)
    found = ranks.run(world_size, under, launched, train_steps, STEPS, **sections(penalty, **training))
    assert_equal(found[-1], alone(penalty, accumulation))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "launched", "penalty", "checkpointing"),
    [
        (2, LAUNCHED["fsdp"], "finite differences", False),
        (2, LAUNCHED["fsdp"], "both kinds", True),
        (4, LAUNCHED["hsdp"], "exact, one of them lazy", True),
        (2, LAUNCHED["ddp"], "both kinds", True),
        (1, {}, "exact, one of them lazy", True),
    ],
)
@pytest.mark.parametrize("compiled", ["blocks", True])
def test_compiled_blocks_are_one_process(
    ranks: RankPool, alone: Any, world_size: int, launched: dict[str, str], penalty: str, checkpointing: bool,
    compiled: object,
) -> None:  # fmt: skip
    given = sections(penalty, activation_checkpointing=checkpointing, compile=compiled)
    found = ranks.run(world_size, under, launched, train_compiled, STEPS, **given)[0]
    # A block is compiled once for all of its kind: per network with and without gradients, and for two batch sizes.
    assert found["graphs"] >= 2
    assert compiled is True or found["graphs"] <= 10
    assert_equal(found, alone(penalty))


def train_compiled(*arguments: Any, **named: Any) -> dict[str, Any]:
    counter: Any = CompileCounterWithBackend("aot_eager")
    patch = pytest.MonkeyPatch()
    patch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=counter))
    torch.compiler.reset()
    try:
        return train_steps(*arguments, **named) | {"graphs": int(counter.frame_count)}
    finally:
        patch.undo()
        torch.compiler.reset()


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "r3gan": {
        "generator": {"architecture": "r3gan", "width": 8, "max_width": 16, "normalization": "none"},
        "discriminator": {"architecture": "r3gan", "width": 8, "max_width": 16, "normalization": "none"},
        "objective": {"r1": {"gamma": 1.0}, "r2": {"gamma": 1.0, "every": 2}},
        "training": {"activation_checkpointing": True},
    },
    "r3gan, interpolated penalty": {
        "generator": {"architecture": "r3gan", "width": 8, "max_width": 16, "normalization": "none"},
        "discriminator": {"architecture": "r3gan", "width": 8, "max_width": 16, "normalization": "none"},
        "objective": {"adversarial": "wasserstein", "r1": None, "gradient_penalty": {}},
        "training": {"activation_checkpointing": True},
    },
    "stylegan2": {
        "generator": {"architecture": "stylegan2", "latent_distribution": "normal", "style_size": 8,
                      "mapping_layers": 2},
        "discriminator": {"architecture": "stylegan2", "minibatch_stddev": {"group_size": 4}},
        "objective": {"terms": [{"term": "path_length", "weight": 2, "every": 2}]},
        "training": {"activation_checkpointing": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_blocks_of_convolutions_are_one_process(ranks: RankPool, name: str) -> None:
    """Stages with batch statistics, and a generator that is one unit because a term looks at all its weights."""
    given = CONVOLUTIONS[name]
    expected = ranks.run(1, train_steps, STEPS, **given | {"training": {}})[0]
    assert_equal(ranks.run(2, under, LAUNCHED["fsdp"], train_steps, STEPS, **given)[0], expected)


def test_shards_stay_float32_under_bfloat16(ranks: RankPool) -> None:
    """And all differs from DDP by what its own sums differ by: a bit of bfloat16 in few activations."""
    low = sections("finite differences", mixed_precision="bf16", **CHECKPOINTED)
    low["objective"] = {"r1": None}
    expected, found = (
        ranks.run(2, under, LAUNCHED[engine], train_steps, STEPS, dtype=torch.float32, **low)[0]
        for engine in ("ddp", "fsdp")
    )
    assert {value.dtype for value in (*found["state"].values(), *found["moments"].values())} == {torch.float32}
    for key, value in expected["state"].items():
        torch.testing.assert_close(found["state"][key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("engine", [needs("zero1"), needs("zero2")])
def test_zero_takes_blocks_that_are_recomputed_and_compiled(ranks: RankPool, alone: Any, engine: str) -> None:
    given = sections("both kinds", **CHECKPOINTED, compile="blocks")
    found = ranks.run(2, under, LAUNCHED[engine], keeping_float64, train_compiled, STEPS, **given)[0]
    assert found["graphs"] >= 2
    assert_equal(found, alone("both kinds"))


def keeping_float64(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function while ZeRO's master weights and sums of gradients, otherwise float32, are float64."""
    _import_deepspeed()
    from deepspeed.runtime.zero import stage_1_and_2

    made: Any = stage_1_and_2.DeepSpeedZeroOptimizer
    initialize = made.__init__

    def initialize_in_float64(optimizer: Any, *given: Any, **options: Any) -> None:
        initialize(optimizer, *given, **options | {"gradient_accumulation_dtype": torch.float64})
        optimizer.communication_data_type = torch.float64
        optimizer.ipg_buckets = {torch.float64: stage_1_and_2.IPGBucket()}

    patch = pytest.MonkeyPatch()
    patch.setattr(made, "__init__", initialize_in_float64)
    patch.setattr(made, "_configure_master_weights", lambda *_, **__: torch.float64)
    try:
        return function(*arguments, **named)
    finally:
        patch.undo()


def bytes_between_updates() -> list[int]:
    """What a rank keeps of each network, as storage, and of the average; and their whole weights."""
    generator, discriminator, average, _ = build(small_config(**TRANSFORMERS), Runtime(), torch.float32)
    networks = (generator.network, discriminator.network, average.network)
    kept = [sum(local(p).untyped_storage().nbytes() for p in network.parameters()) for network in networks]
    return [*kept, *(sum(p.numel() * 4 for p in network.parameters()) for network in networks)]


def test_a_rank_keeps_its_share_of_weights_and_average(ranks: RankPool) -> None:
    for *kept, _, _, _ in (found := ranks.run(2, under, LAUNCHED["fsdp"], bytes_between_updates)):
        assert all(part < 0.6 * whole for part, whole in zip(kept, found[0][3:], strict=True))


def sharded_averages() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average after three updates of it, and what the formula makes of whole weights."""
    players = build(small_config(**TRANSFORMERS), Runtime(), torch.float32)
    generator, discriminator, average = players[:3]
    names = [name for name, _ in generator.network.named_parameters()]
    expected = {name: whole_state(generator, discriminator, average)[f"ema/{name}"] for name in names}
    for step in range(3):
        with torch.no_grad():
            for number, weight in enumerate(generator.network.parameters()):
                local(weight).mul_(1 + 0.1 * step).add_(0.01 * number)
        average.update(0.9, torch.ones(()))
        found = whole_state(generator, discriminator, average)
        for name in names:
            expected[name] += (found[f"g/{name}"] - expected[name]) * torch.tensor(1.0 - 0.9)
    return {name: found[f"ema/{name}"] for name in names}, expected


def test_the_average_of_shards_is_bitwise_that_of_whole_weights(ranks: RankPool) -> None:
    for found, expected in ranks.run(2, under, LAUNCHED["fsdp"], sharded_averages):
        assert len(found) > 20
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_skipped_update_of_blocks_leaves_nothing_behind(ranks: RankPool) -> None:
    given = sections("both kinds", **CHECKPOINTED)
    expected = ranks.run(1, train_steps, 4, nan_at=2, **given)[0]
    found = ranks.run(2, under, LAUNCHED["fsdp"], train_steps, 4, nan_at=2, **given)[0]
    assert found["skipped"] == expected["skipped"] == 1
    before, skipped, after = found["snapshots"][1:4]
    assert all(torch.equal(before[key], skipped[key]) for key in before if key.startswith("d/"))
    assert not torch.equal(skipped["d/embed.weight"], after["d/embed.weight"])
    assert_equal(found, expected)


class Affine(nn.Module):
    """x W + b, and how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.runs = nn.Linear(3, 3), 0

    def forward(self, values: Tensor) -> Tensor:
        self.runs += 1
        found: Tensor = self.layer(values).tanh()
        return found


def test_a_checkpointed_block_runs_again_in_the_backward_pass_and_copies_well() -> None:
    block, values = Affine(), torch.rand(2, 3)
    twin = copy.deepcopy(block)
    checkpoint_activations(block)
    names = list(block.state_dict())
    assert names == list(twin.state_dict())
    other = copy.deepcopy(block)
    for each in (block, twin, other):
        each(values).square().sum().backward()
    assert (block.runs, twin.runs, other.runs) == (2, 1, 2)
    assert all(torch.equal(one.grad, two.grad) for one, two in zip(block.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        block(values)
    assert block.runs == 3


@pytest.mark.parametrize(
    ("discriminator", "parts"),
    [
        ({}, ["discriminator.architecture = dcgan declares no blocks", "set it to false"]),
        ({"architecture": "resnet", "spectral_norm": True, "normalization": "none"}, ["spectral norm", "move again"]),
        ({"architecture": "resnet", "normalization": "virtual", "reference_size": 4}, ["virtual batch norm"]),
    ],
)
def test_networks_that_cannot_be_recomputed_are_refused(discriminator: dict[str, Any], parts: list[str]) -> None:
    data = {"resolution": 32 if discriminator else 16}
    config = small_config(discriminator=discriminator, training=CHECKPOINTED, data=data)
    network = build_discriminator(config.discriminator, sample_shape(config.data))
    with pytest.raises(UserError) as caught:
        prepare_passes("discriminator", network, config)
    assert all(part in str(caught.value) for part in ["training.activation_checkpointing = true", *parts])


def test_declared_blocks() -> None:
    network = nn.Module()
    assert declared_blocks(network) == []
    network.blocks = 3  # type: ignore[assignment]
    assert declared_blocks(network) == []
    network.blocks = nn.ModuleList([nn.Identity(), nn.ReLU()])
    assert declared_blocks(network) == list(network.blocks)
