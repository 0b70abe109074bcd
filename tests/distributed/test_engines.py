"""The engines against DDP on the same ranks, seed and config, and on what an update leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distgan.distributed.runtime import Runtime
from distgan.players.objective_base import Objective
from distgan.players.player import Player
from tests.distributed.test_players import build, small_config, train_steps
from tests.engines import LAUNCHED, needs, stored, under, whole
from tests.ranks import RankPool

DIVIDED = [needs("zero1"), needs("zero2"), needs("fsdp")]
ZERO2_AND_FSDP = [needs("zero2"), needs("fsdp")]
EVERY = ["ddp", *DIVIDED]

RISING = {"optimizer": {"betas": [0.5, {"start": 0.9, "end": 0.999, "over": 0.1, "shape": "cosine"}]}}
PENALISED: dict[str, Any] = {
    "generator": RISING,
    "discriminator": RISING,
    "objective": {
        "adversarial": "relativistic_paired",
        "r1": {"gamma": 1.0},
        "r2": {"gamma": 1.0},
        "historical_averaging": {"generator": 0.1, "discriminator": 0.1},
    },
}
CLIPPED: dict[str, Any] = {
    "objective": {"adversarial": "wasserstein", "r1": None, "weight_clipping": {"limit": 0.01}},
    "generator": {"optimizer": {"name": "rmsprop"}},
    "discriminator": {"optimizer": {"name": "rmsprop"}},
}


STYLEGAN2: dict[str, Any] = {
    "generator": {"architecture": "stylegan2", "latent_distribution": "normal", "style_size": 8, "mapping_layers": 2},
    "discriminator": {"architecture": "stylegan2"},
    "objective": {"terms": [{"term": "path_length", "weight": 2, "every": 2}]},
}


def trained(ranks: RankPool, engine: str, *arguments: Any, world_size: int = 2, **named: Any) -> list[dict[str, Any]]:
    """What `train_steps` returns in float32 under an engine, of each rank."""
    named = {"dtype": torch.float32, **named}
    return ranks.run(world_size, under, LAUNCHED[engine], train_steps, *arguments, **named)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal but for an absolute error, and for the last bit of float32: at 1 that bit alone is 1.2e-7."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        bit = torch.finfo(torch.float32).eps
        torch.testing.assert_close(found[key], value, rtol=bit, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("engine", DIVIDED)
def test_twenty_steps_with_penalties_end_where_ddp_does(ranks: RankPool, engine: str) -> None:
    """Weights, their average and the averages over time, and moments. Gradients are bitwise the same (see the test of
    clipping); torch's fused Adam treats an entry in the middle of a vector and one at its end differently by 1e-8."""
    expected, found = (trained(ranks, kind, 20, **PENALISED)[0] for kind in ("ddp", engine))
    assert_close(found["state"], expected["state"], 1e-7)
    assert_close(found["moments"], expected["moments"], 1e-6)
    for step, losses in enumerate(expected["losses"]):
        assert found["losses"][step] == pytest.approx(losses, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("engine", [needs("fsdp")])
def test_methods_and_buffers_of_a_sharded_generator(ranks: RankPool, engine: str) -> None:
    """Path length calls the generator's methods, not its forward, inside the objective; and its buffers move."""
    expected, found = (trained(ranks, kind, 5, **STYLEGAN2)[0] for kind in ("ddp", engine))
    assert_close(found["state"], expected["state"], 1e-6)
    assert expected["state"]["ema/path_length"] > 0
    assert expected["state"]["ema/average_style"].any()


@pytest.mark.parametrize("engine", DIVIDED)
def test_clipped_weights_stay_clipped(ranks: RankPool, engine: str) -> None:
    """The copy of the weights that ZeRO's optimizer moves would bring back what was clamped."""
    expected, found = (trained(ranks, kind, 8, **CLIPPED)[0] for kind in ("ddp", engine))
    for snapshot, wanted in zip(found["snapshots"], expected["snapshots"], strict=True):
        clipped = {key: value for key, value in snapshot.items() if key.startswith("d/")}
        assert all(value.abs().max() <= 0.01 for key, value in clipped.items() if "running" not in key)
        assert all(torch.equal(value, wanted[key]) for key, value in clipped.items())
    assert all(torch.equal(found["state"][key], value) for key, value in expected["state"].items())
    assert all(torch.equal(found["moments"][key], value) for key, value in expected["moments"].items())


@pytest.mark.parametrize("engine", DIVIDED)
def test_accumulated_and_scaled_gradients_are_those_of_ddp(ranks: RankPool, engine: str) -> None:
    scaled = {"optimizer": {**RISING["optimizer"], "max_gradient_norm": 0.1}}
    accumulated = {
        **PENALISED, "generator": scaled, "discriminator": scaled, "training": {"gradient_accumulation_steps": 4},
    }  # fmt: skip
    expected, found = (trained(ranks, kind, 6, **accumulated)[0] for kind in ("ddp", engine))
    assert_close(found["state"], expected["state"], 1e-7)
    assert_close(found["moments"], expected["moments"], 1e-6)


def weights_after_a_forward_pass() -> bool:
    """Whether the weights of a network are sharded between the forward and the backward pass of its player."""
    player = four_weights(Linear)
    player.engine.module(1.0)
    return isinstance(player.network.weight, DTensor)


@pytest.mark.parametrize(("setting", "sharded"), [("true", True), ("false", False), (None, True)])
def test_fsdp_reshard_after_forward_is_honored(ranks: RankPool, setting: str | None, sharded: bool) -> None:
    launched = LAUNCHED["fsdp"] | ({} if setting is None else {"FSDP_RESHARD_AFTER_FORWARD": setting})
    assert ranks.run(2, under, launched, weights_after_a_forward_pass) == [sharded] * 2


def test_resharded_weights_end_where_ddp_does(ranks: RankPool) -> None:
    accumulated = {**PENALISED, "training": {"gradient_accumulation_steps": 4}}
    launched = LAUNCHED["fsdp"] | {"FSDP_RESHARD_AFTER_FORWARD": "true"}
    found = ranks.run(2, under, launched, train_steps, 6, dtype=torch.float32, **accumulated)[0]
    assert_close(found["state"], trained(ranks, "ddp", 6, **accumulated)[0]["state"], 1e-7)


@pytest.mark.parametrize("engine", ZERO2_AND_FSDP)
def test_bfloat16_is_in_the_networks_only(ranks: RankPool, engine: str) -> None:
    """Weights, moments and averages are float32 under every engine, so that bfloat16 differs from float32 as it does
    under DDP, and ten updates of at most 1e-3 cannot be lost in its 8 bits."""
    low = {**PENALISED, "training": {"mixed_precision": "bf16"}}
    expected, found = (trained(ranks, kind, 10, **low)[0] for kind in ("ddp", engine))
    assert_close(found["state"], expected["state"], 1e-6)
    assert {value.dtype for value in (*found["state"].values(), *found["moments"].values())} == {torch.float32}
    full = trained(ranks, engine, 10, **PENALISED)[0]["state"]
    differences = [(found["state"][key] - full[key]).abs().max().item() for key in full]
    assert 1e-6 < max(differences) < 2 * 10 * 1e-3


@pytest.mark.parametrize("engine", DIVIDED)
def test_a_skipped_update_leaves_nothing_behind(ranks: RankPool, engine: str) -> None:
    """One NaN sample on one rank: no rank's discriminator moves in that step, and all goes on afterwards."""
    expected, found = (trained(ranks, kind, 4, nan_at=2, **PENALISED)[0] for kind in ("ddp", engine))
    assert found["skipped"] == expected["skipped"] == 1
    before, skipped, after = found["snapshots"][1:4]
    assert all(torch.equal(before[key], skipped[key]) for key in before if key.startswith("d/"))
    assert not torch.equal(skipped["d/logit.weight"], after["d/logit.weight"])
    assert found["moments"]["logit.weight/step"].item() == 3
    assert_close(found["state"], expected["state"], 1e-7)
    assert_close(found["moments"], expected["moments"], 1e-6)


class Linear(Objective):
    """A loss whose gradient, of each of four weights, is a number given."""

    role = "generator"

    def forward(self, gradient: float) -> Any:
        loss = gradient * self.network.weight.sum()
        return loss, {"loss": loss.detach()}


class Broken(Linear):
    """On demand, the gradient of the first weight alone is not finite, and the loss is."""

    def forward(self, broken: bool) -> Any:
        loss, parts = super().forward(1.0)
        if broken:
            loss = loss + (0.0 * self.network.weight.flatten()[0]).sqrt()
        return loss, parts


def four_weights(objective: type[Objective], gradients_in_bf16: bool = False) -> Player:
    """A player of four weights that are 1, whose optimizer's one moment is the last gradient's square."""
    network = nn.Linear(1, 4, bias=False)
    nn.init.ones_(network.weight)
    config = small_config(generator={"optimizer": {"name": "rmsprop", "alpha": 0.0}})
    runtime = Runtime(gradients_in_bf16=gradients_in_bf16)
    return Player(objective(network, nn.Identity(), config, None), config.generator.optimizer, runtime)


def square_averages(player: Player) -> list[float]:
    """The optimizer's moment of each weight, as rank 0 sees it."""
    return whole(player.engine.optimizer_state()).get("weight/square_avg", torch.empty(0)).flatten().tolist()


def update_with_one_bad_gradient() -> tuple[list[float], list[float], list[float]]:
    player = four_weights(Broken)
    applied = [player.update([broken], (), {"lr": 0.25}).item() for broken in (True, False)]
    return applied, whole(player.engine.weights())["weight"].flatten().tolist(), square_averages(player)


@pytest.mark.parametrize("engine", EVERY)
def test_ranks_agree_on_a_gradient_that_only_one_of_them_sees(ranks: RankPool, engine: str) -> None:
    """The loss is finite, and so are the gradients of the second rank's share of the weights."""
    found = ranks.run(2, under, LAUNCHED[engine], update_with_one_bad_gradient)
    assert [applied for applied, *_ in found] == [[0.0, 1.0]] * 2
    # The one update that counts moves each weight, of gradient 1, by the learning rate.
    assert found[0][1] == pytest.approx([0.75] * 4)
    assert found[0][2] == [1.0] * 4


def squared_mean_gradient(gradients_in_bf16: bool) -> list[float]:
    player = four_weights(Linear, gradients_in_bf16)
    player.update([1.0 + player.runtime.rank * 2**-10], (), {"lr": 0.25})
    return square_averages(player)


@pytest.mark.parametrize("engine", EVERY)
def test_gradients_may_travel_in_bfloat16(ranks: RankPool, engine: str) -> None:
    """It has 8 bits: 1 + 2^-10 is 1 there."""
    exact, rounded = (ranks.run(2, under, LAUNCHED[engine], squared_mean_gradient, low)[0] for low in (False, True))
    assert exact == pytest.approx([(1 + 2**-11) ** 2] * 4, rel=1e-6)
    assert rounded == [1.0] * 4


def passed_through(saved: dict[str, Any]) -> dict[str, Any]:
    """What a player gives out of the weights and moments that it was given."""
    player, *_ = build(small_config(**PENALISED), Runtime(), torch.float32)
    player.engine.load_weights(stored(saved["weights"]))
    player.engine.load_optimizer_state(stored(saved["moments"]))
    return {"weights": whole(player.engine.weights()), "moments": whole(player.engine.optimizer_state())}


@pytest.mark.parametrize("engine", DIVIDED)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_state_passes_through_any_engine_unchanged(ranks: RankPool, engine: str, world_size: int) -> None:
    """Weights and moments that an engine divides among its ranks come out of it as they were, bit for bit."""
    player, *_ = build(small_config(**PENALISED), Runtime(), torch.float32)
    moments = {
        f"{name}/{quantity}": torch.tensor(7.0) if quantity == "step" else torch.rand_like(weight)
        for name, weight in player.network.named_parameters()
        for quantity in player.quantities
    }
    weights = {name: torch.rand_like(value) for name, value in player.network.state_dict().items()}
    saved = {"weights": weights, "moments": moments}
    found = ranks.run(world_size, under, LAUNCHED[engine], passed_through, saved)[0]
    for name, tensors in saved.items():
        assert found[name].keys() == tensors.keys()
        assert all(torch.equal(found[name][key], value) for key, value in tensors.items())


def bucket_size(config: dict[str, Any]) -> tuple[int, int]:
    player, *_ = build(small_config(**config), Runtime(), torch.float32)
    weights = sum(weight.numel() for weight in player.network.parameters())
    return weights, player.engine.module.zero_reduce_bucket_size()  # type: ignore[operator]


@pytest.mark.parametrize("engine", [needs("zero2")])
def test_gradient_buffers_are_no_larger_than_the_network(ranks: RankPool, engine: str) -> None:
    """They are filled anew at each update where kernels are deterministic: by default 4 GB, in fifteen seconds."""
    weights, bucket = ranks.run(2, under, LAUNCHED[engine], bucket_size, {})[0]
    assert bucket == weights
    weights, bucket = ranks.run(2, under, LAUNCHED[engine], bucket_size, {"generator": {"width": 512}})[0]
    assert bucket == 25 * 2**20 // 4 < weights
