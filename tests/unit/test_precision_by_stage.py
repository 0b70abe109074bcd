"""Precision by stage, in passes with second derivatives too (R3GAN: train.py:182,253,279; training/networks.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgan.config import Config, parse_config
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.stage import Stage, set_float32_below
from distgan.networks.shape import SampleShape
from distgan.players.finite_differences import check_finite_differences
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.objective_base import Objective
from distgan.players.samples import MicroBatch

SHAPE = SampleShape(resolution=32, channels=3, num_classes=3)
BF16, FLOAT32 = torch.bfloat16, torch.float32


def config_of(precision: Any, resolution: int = 32) -> Config:
    network = {"architecture": "r3gan", "width": 8, "max_width": 16, "depth": 1}
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": resolution, "labels": True},
            "generator": {**network, "latent_size": 4},
            "discriminator": network,
            "objective": {"adversarial": "relativistic_paired", "r1": {"gamma": 1.0}, "r2": {"gamma": 1.0}},
            "training": {"steps": 1, "batch_size": 4, "mixed_precision": precision},
        }
    )


def players(precision: Any) -> tuple[Objective, Objective, MicroBatch]:
    """Both objectives of networks whose blocks are not the identity, and a batch."""
    config = config_of(precision)
    networks = build_generator(config.generator, SHAPE), build_discriminator(config.discriminator, SHAPE)
    fixed = torch.Generator().manual_seed(0)
    for network in networks:
        for parameter in network.parameters():
            if not parameter.any():
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=fixed))
        if config.training.float32_below is not None:
            set_float32_below(network, "r3gan", config.training.float32_below)
    dtype = BF16 if config.training.autocasts else None
    latents, reals = torch.randn(4, 4, generator=fixed), torch.randn(4, 3, 32, 32, generator=fixed)
    labels = torch.tensor([0, 1, 2, 0])
    batch = MicroBatch(torch.arange(4), latents, None, reals, labels)
    return (
        DiscriminatorObjective(networks[1], networks[0], config, dtype),
        GeneratorObjective(*networks, config, dtype),
        batch,
    )


def update(objective: Objective, batch: MicroBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The values and the whole gradient of a pass."""
    loss, parts = objective(batch, 0, 0) if objective.role == "discriminator" else objective(batch, 0)
    loss.backward()
    gradients = [parameter.grad for parameter in objective.network.parameters()]
    assert all(gradient is not None and gradient.dtype == FLOAT32 for gradient in gradients)
    return parts, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def watch(network: nn.Module) -> list[tuple[int, torch.dtype]]:
    seen: list[tuple[int, torch.dtype]] = []
    for stage in network.modules():
        if isinstance(stage, Stage):
            stage.register_forward_hook(lambda layer, _, out: seen.append((layer.resolution, out.dtype)))
    return seen


@pytest.mark.parametrize(
    ("precision", "low"),
    [({"float32_below": 8}, {4}), ({"float32_below": 16}, {4, 8}), ({"float32_below": 4}, set()), ("bf16", None)],
)
def test_the_precision_of_each_stage(precision: Any, low: set[int] | None) -> None:
    """CIFAR-10's preset has 4x4 in float32, FFHQ-256's all below 32, in both networks and in penalized passes; plain
    `bf16` has float32 in whole penalized passes."""
    for objective, batch in ((found, players(precision)[2]) for found in players(precision)[:2]):
        seen, other = watch(objective.network), watch(objective.opponent)
        parts, _ = update(objective, batch)
        assert {part.dtype for part in parts.values()} == {FLOAT32}
        penalized = objective.role == "discriminator" and low is None
        for side, dtype in [*seen, *other]:
            assert dtype == (FLOAT32 if side in (low or ()) else BF16) or (penalized and (side, dtype) in seen)
        if penalized:
            assert {dtype for _, dtype in seen} == {FLOAT32}
        assert {side for side, _ in seen} == {4, 8, 16, 32}


def test_gradients_of_penalties_are_those_of_float32_but_for_rounding() -> None:
    exact, rounded = players("no"), players({"float32_below": 8})
    for one, other in zip(exact[:2], rounded[:2], strict=True):
        (expected, gradient), (found, approximate) = update(one, exact[2]), update(other, rounded[2])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0.05, atol=0.02, msg=name)
        error = ((approximate - gradient).norm() / gradient.norm()).item()
        assert 1e-5 < error < 0.05, (one.role, error)


class Given(nn.Module):
    """A generator of fixed images."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.linspace(-1, 1, len(latents) * 3 * 32 * 32).view(-1, 3, 32, 32).sin()


def test_float32_stages_are_exact_in_all_derivatives() -> None:
    """If all stages are float32, losses, first and second derivatives are bitwise those without bfloat16: nothing of
    the backward passes is cast."""
    found: list[tuple[dict[str, Tensor], Tensor]] = []
    for precision in ("no", {"float32_below": 32}):
        objective, _, batch = players(precision)
        if precision != "no":
            set_float32_below(objective.network, "r3gan", 64)
        dtype = None if precision == "no" else BF16
        found.append(update(DiscriminatorObjective(objective.network, Given(), config_of(precision), dtype), batch))
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_a_network_without_stages_is_refused() -> None:
    with pytest.raises(UserError, match="mine: has_stages is set, but"):
        set_float32_below(nn.Linear(1, 1), "mine", 8)
    with pytest.raises(UserError, match=r"float32_below: 64 is above data\.resolution = 32"):
        config_of({"float32_below": 64})


BY_DIFFERENCES = {"gamma": 2.0, "method": "finite_difference"}


def differences_config(below: int, architecture: str = "r3gan", resolution: int = 32) -> Config:
    sizes = {"r3gan": {"width": 8, "max_width": 16, "depth": 1}, "gat": {"width": 16, "depth": 4, "heads": 2}}
    network = {"architecture": architecture, **sizes[architecture]}
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": resolution},
            "generator": {**network, "latent_distribution": "normal"},
            "discriminator": network,
            "objective": {"r1": BY_DIFFERENCES},
            "training": {"steps": 1, "batch_size": 4, "mixed_precision": {"float32_below": below}},
        }
    )


@pytest.mark.parametrize("classes", [0, 3])
def test_finite_differences_need_the_last_layers_of_r3gan_in_float32(classes: int) -> None:
    """Also with classes, where a product with float32 embeddings hides that the last layer is bfloat16."""
    shape = SampleShape(resolution=32, channels=3, num_classes=classes)
    config = differences_config(4)
    network = build_discriminator(config.discriminator, shape)
    with pytest.raises(UserError, match=r"r1: .*float32_below = 4 runs the last layers .*: r3gan .*; set it to 8, or"):
        check_finite_differences(network, config, shape)
    assert {stage.float32_below for stage in network.modules() if isinstance(stage, Stage)} == {0}, "left as it was"
    for below in (8, 16):
        (told,) = check_finite_differences(network, differences_config(below), shape)
        assert "kinks" in told


@pytest.mark.parametrize("without", ["", "head", "label_mapping"])
def test_the_last_layers_of_gat_are_float32_with_any_value(without: str) -> None:
    config, shape = differences_config(4, "gat"), SampleShape(resolution=32, channels=3, num_classes=3)
    network = build_discriminator(config.discriminator, shape)
    set_float32_below(network, "gat", 4)
    if without:
        setattr(network, without, nn.Sequential(*network.get_submodule(without)))
    seen: dict[str, torch.dtype] = {}
    for name in ("blocks.3.dense", "head", "label_mapping"):
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=BF16):
        logits = network(torch.randn(2, 12, 32, 32), torch.tensor([0, 2]))
    if not without:
        assert seen == {"blocks.3.dense": BF16, "head": FLOAT32, "label_mapping": FLOAT32}
        assert logits.dtype == FLOAT32
        assert check_finite_differences(network, config, shape) == []
        return
    with pytest.raises(UserError, match=r"r1: .*last layers of .*: gat in bfloat16; build these of .*Stage\(1, "):
        check_finite_differences(network, config, shape)


class Slope(nn.Module):
    """D(x) = w . x + 100, whose logits bfloat16 rounds to multiples of 1/2."""

    def __init__(self, last: type[nn.Sequential] | None = None) -> None:
        super().__init__()
        self.above = Stage(32, nn.Identity())
        layer = nn.Linear(3 * 8 * 8, 1)
        self.last = Stage(1, layer) if last is None else last(layer)
        torch.nn.init.constant_(layer.weight, 0.1)
        torch.nn.init.constant_(layer.bias, 100.0)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.last(self.above(samples.flatten(1))).squeeze(1)
        return logits


class Reals(nn.Module):
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents


def test_a_linear_discriminator_of_stages_is_penalized_by_its_squared_norm() -> None:
    """(w.n)^2 has the mean |w|^2 = 192 * 0.1^2 and the variance 2 |w|^4."""
    config, shape = differences_config(8, resolution=8), SampleShape(resolution=8, channels=3)
    count, squared = 4000, 1.92
    reals = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(torch.arange(count), reals, None, reals, None)
    found = {}
    for last in (None, nn.Sequential):
        network = Slope(last)
        set_float32_below(network, "mine", 8)
        found[last] = DiscriminatorObjective(network, Reals(), config, BF16)(batch, 0, 0)[1]["loss/r1"].item()
    error = 4 * (2 / count) ** 0.5 * squared
    assert found[None] == pytest.approx(2.0 / 2 * squared, abs=error)
    assert found[nn.Sequential] > 4 * squared, "what rounding does to it"
    assert check_finite_differences(Slope(), config, shape) == []
    with pytest.raises(UserError, match="last layers"):
        check_finite_differences(Slope(nn.Sequential), config, shape)
