"""GAT's networks and one update of each player against formulas written by hand, in float64.

The formulas are those of the released code (hse1032/GAT): models/generator.py, models/discriminator.py,
models/pos_embed.py and losses/Rp_PT_loss.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distgan import load_generator, randomness, train
from distgan.config import Config, parse_config
from distgan.data.packing.pack import pack
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.inference.export import export
from distgan.networks import assign_weights, build_discriminator, build_generator
from distgan.networks.shape import SampleShape, sample_shape
from distgan.players.finite_differences import check_finite_differences
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.player import Player
from distgan.players.samples import MicroBatch

SIDE, PATCH, CHANNELS, CLASSES, LATENT, WIDTH, HEADS, DEPTH, BATCH = 8, 2, 3, 3, 6, 16, 2, 4, 4
SHAPE = SampleShape("images", resolution=SIDE, channels=CHANNELS, num_classes=CLASSES)
LIMIT = 0.1
LABELS = torch.tensor([0, 2, 2, 1])
Weights = dict[str, Tensor]


def config_of(**changes: Any) -> Config:
    network = {
        "architecture": "gat", "patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS,
        "optimizer": {
            "name": "torch.optim:AdamW", "learning_rate": 1e-2, "betas": [0, 0.99], "weight_decay": 0,
            "max_gradient_norm": LIMIT,
        },
    }  # fmt: skip
    differences = {"gamma": 0.1, "method": "finite_difference", "antithetic": False, "sigma": 0.01}
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": SIDE, "channels": CHANNELS, "labels": True},
            "generator": {**network, "latent_size": LATENT, "latent_distribution": "normal"},
            "discriminator": {**network, "projection_size": 12},
            "objective": {"adversarial": "relativistic_paired", "r1": differences, "r2": differences, **changes},
            "training": {"steps": 1, "batch_size": BATCH},
        },
        trust=True,
    )


def networks(config: Config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Both networks in float64, with weights that are large enough for all parts to matter."""
    shape = sample_shape(config.data, num_classes=CLASSES)
    built = build_generator(config.generator, shape).double(), build_discriminator(config.discriminator, shape).double()
    fixed = torch.Generator().manual_seed(0)
    for network in built:
        for name, parameter in network.named_parameters():
            scale = 30.0 if "mapping" in name else 0.3
            parameter.data = scale * torch.randn(parameter.shape, generator=fixed, dtype=torch.float64)
    return built


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def attention(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (x @ w["inputs.weight"].T + w["inputs.bias"]).chunk(3, dim=-1)
    size, count = WIDTH // HEADS, (SIDE // PATCH) ** 2
    found = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        eps = torch.finfo(x.dtype).eps
        query = turn(norm(q[..., part], eps) * w["query_norm.weight"], count)
        key = turn(norm(k[..., part], eps) * w["key_norm.weight"], count)
        found.append((query @ key.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v[..., part])
    return torch.cat(found, -1) @ w["output.weight"].T + w["output.bias"]


def turn(x: Tensor, count: int) -> Tensor:
    """Turn each pair of channels of the last `count` tokens by an angle: of the row, then of the column."""
    turned, size, side = x.clone(), x.shape[-1], SIDE // PATCH
    first = x.shape[1] - count
    for cell in range(count):
        for pair in range(size // 2):
            place = cell // side if pair < size // 4 else cell % side
            angle = place * 10_000.0 ** -(2 * (pair % (size // 4)) / (size // 2))
            cosine, sine = float(np.float32(math.cos(angle))), float(np.float32(math.sin(angle)))
            a, b = x[:, first + cell, 2 * pair], x[:, first + cell, 2 * pair + 1]
            turned[:, first + cell, 2 * pair] = a * cosine - b * sine
            turned[:, first + cell, 2 * pair + 1] = b * cosine + a * sine
    return turned


def gated(w: Weights, x: Tensor) -> Tensor:
    one, two = (x @ w["inputs.weight"].T + w["inputs.bias"]).chunk(2, -1)
    return (one * one.sigmoid() * two) @ w["output.weight"].T + w["output.bias"]


def positions() -> Tensor:
    """models/pos_embed: for each cell sines and cosines of its column, then of its row, as float32."""
    table = torch.zeros((SIDE // PATCH) ** 2, WIDTH, dtype=torch.float64)
    for cell in range(len(table)):
        row, column = divmod(cell, SIDE // PATCH)
        for half, place in enumerate((column, row)):
            for number in range(WIDTH // 4):
                angle = place / 10_000.0 ** (number / (WIDTH / 4))
                table[cell, half * WIDTH // 2 + number] = float(np.float32(math.sin(angle)))
                table[cell, half * WIDTH // 2 + WIDTH // 4 + number] = float(np.float32(math.cos(angle)))
    return table


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def slow(w: Weights, x: Tensor) -> Tensor:
    """Two dense layers whose weights are used a hundredth as large."""
    x = x @ (w["0.weight"] * 0.01).T + w["0.bias"] * 0.01
    return (x * x.sigmoid()) @ (w["2.weight"] * 0.01).T + w["2.bias"] * 0.01


def generated(w: Weights, z: Tensor) -> Tensor:
    """All levels, (n, 4, C, H, W)."""
    style = slow(below(w, "mapping."), torch.cat((norm(w["embedding.weight"][LABELS], 1e-8), norm(z, 1e-8)), 1))
    active = style * style.sigmoid()
    x = positions().expand(len(z), -1, -1)
    levels: list[Tensor] = []
    for number in range(DEPTH):
        block = below(w, f"blocks.{number}.")
        entered = active @ block["modulation.1.weight"].T + block["modulation.1.bias"]
        s1, g1, s2, g2 = (part[:, None] for part in entered.chunk(4, 1))
        x = x + g1 * attention(below(block, "attention."), norm(x) * (1 + s1))
        x = x + g2 * gated(below(block, "dense."), norm(x) * (1 + s2))
        if (number + 1) % (DEPTH // 4) == 0:
            last = below(w, f"to_sample.{len(levels)}.")
            scale = (active @ last["modulation.1.weight"].T + last["modulation.1.bias"])[:, None]
            patches = (norm(x) * (1 + scale)) @ last["output.weight"].T + last["output.bias"]
            image = torch.zeros(len(z), CHANNELS, SIDE, SIDE, dtype=z.dtype)
            for cell in range(x.shape[1]):
                row, column = divmod(cell, SIDE // PATCH)
                square = patches[:, cell].view(-1, PATCH, PATCH, CHANNELS).permute(0, 3, 1, 2)
                rows, columns = slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH)
                image[:, :, rows, columns] = square
            levels.append(image + levels[-1] if levels else image)
    return torch.stack(levels, 1)


def judged(w: Weights, x: Tensor) -> Tensor:
    """Logits of samples (n, 4, C, H, W)."""
    cells = torch.nn.functional.unfold(x.flatten(1, 2), PATCH, stride=PATCH).transpose(1, 2)
    tokens = cells @ w["embed.weight"].flatten(1).T + w["embed.bias"]
    tokens = tokens + positions()
    tokens = torch.cat((w["class_token"].expand(len(x), -1, -1), tokens), 1)
    for number in range(DEPTH):
        b = below(w, f"blocks.{number}.")
        entering = norm(tokens) * b["attention_norm.weight"]
        tokens = tokens + b["attention_scale"] * attention(below(b, "attention."), entering)
        tokens = tokens + b["dense_scale"] * gated(below(b, "dense."), norm(tokens) * b["dense_norm.weight"])
    features = (norm(tokens[:, 0]) * w["head.0.weight"]) @ w["head.1.weight"].T + w["head.1.bias"]
    return (features * slow(below(w, "label_mapping."), w["embedding.weight"][LABELS])).sum(1)


def copies(network: torch.nn.Module) -> Weights:
    return {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}


def noised(levels: Tensor, purpose: str) -> Tensor:
    """Rp_PT_loss.py:84-121: from the last level to the first, faded noise and an increment."""
    drawn = randomness.normal(0, purpose, torch.arange(BATCH), levels.shape[1:]).double()
    carried, before, found = torch.zeros_like(levels[:, 0]), 0.0, []
    for level, share in ((3, 0.01), (2, 0.51), (1, 0.76), (0, 0.885)):
        fade = (1 - share) / (1 - before)
        carried = carried * fade + math.sqrt(share**2 - before**2 * fade**2) * drawn[:, level]
        found.append((1 - share) * levels[:, level] + carried)
        before = share
    return torch.stack(found[::-1], 1)


def adamw(weights: Weights, loss: Tensor) -> Weights:
    """One step from zero moments, with betas (0, 0.99), of the gradient cut to a norm of 0.1."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert length > LIMIT
    return {
        name: weight.detach() - 1e-2 * (scaled := gradient * LIMIT / (length + 1e-6)) / (scaled.abs() + 1e-8)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def check_loss_and_gradients(player: Player, batch: MicroBatch, loss: Tensor, weights: Weights) -> None:
    """Compare with the objective. The first step of AdamW is mostly the sign of the gradient, which hides its size."""
    found, _ = player.objective(batch, 0, 0)
    gradients = torch.autograd.grad(found, list(player.network.parameters()))
    expected = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
    torch.testing.assert_close((found, *gradients), (loss, *expected), rtol=1e-8, atol=1e-10)


def test_one_update_of_each_player_is_that_of_the_formulas() -> None:
    config = config_of()
    generator, discriminator = networks(config)
    fixed = torch.Generator().manual_seed(1)
    latents = torch.randn(BATCH, LATENT, generator=fixed, dtype=torch.float64)
    reals = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=fixed, dtype=torch.float64)
    batch = MicroBatch(torch.arange(BATCH), latents, LABELS, reals, LABELS)
    g, d = copies(generator), copies(discriminator)
    runtime = Runtime()
    players = (
        Player(DiscriminatorObjective(discriminator, generator, config, None), config.discriminator.optimizer, runtime),
        Player(GeneratorObjective(generator, discriminator, config, None), config.generator.optimizer, runtime),
    )

    with torch.no_grad():
        fakes = generated(g, latents)
    torch.testing.assert_close(generator(latents, LABELS).unflatten(1, (4, -1)), fakes, rtol=1e-10, atol=1e-10)
    four = reals[:, None].expand(-1, 4, -1, -1, -1)
    logits = {"real": judged(d, noised(four, "discriminator/noise of real"))}
    logits["fake"] = judged(d, noised(fakes, "discriminator/noise of fake"))
    loss = torch.nn.functional.softplus(logits["fake"] - logits["real"]).mean()
    for kind, clean in (("real", reals), ("fake", fakes.flatten(1, 2))):
        purpose = f"discriminator/finite differences of {kind}/0"
        step = 0.01 * randomness.normal(0, purpose, torch.arange(BATCH), clean.shape[1:]).double()
        moved = (clean + step).unflatten(1, (-1, CHANNELS)).expand(-1, 4, -1, -1, -1)
        ahead = judged(d, noised(moved, f"discriminator/noise of {kind}"))
        loss = loss + 0.1 / 2 * ((ahead - logits[kind]) / 0.01).square().mean()
    settings = {"lr": 1e-2}
    check_loss_and_gradients(players[0], batch, loss, d)
    torch.testing.assert_close(discriminator(fakes.flatten(1, 2), LABELS), judged(d, fakes), rtol=1e-10, atol=1e-10)
    players[0].update([batch], (0, 0), settings)
    expected = adamw(d, loss)
    for name, weight in discriminator.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-6, atol=1e-7, msg=name)

    d = copies(discriminator)
    real = judged(d, noised(four, "generator/noise of real"))
    fake = judged(d, noised(generated(g, latents), "generator/noise of fake"))
    loss = torch.nn.functional.softplus(real.detach() - fake).mean()
    check_loss_and_gradients(players[1], batch, loss, g)
    players[1].update([batch], (0, 0), settings)
    expected = adamw(g, loss)
    for name, weight in generator.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-6, atol=1e-7, msg=name)


def test_styles_follow_the_mean_of_their_class_and_can_be_truncated_toward_it() -> None:
    generator, _ = networks(config_of())
    latents = torch.randn(BATCH, LATENT, dtype=torch.float64)
    styles = generator.styles(latents, LABELS)[:, 0].detach()
    expected = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
    for label in range(CLASSES):
        expected[label] = 0.005 * styles[label == LABELS].mean(0)
    torch.testing.assert_close(generator.average_styles, expected)
    generator.eval()
    kept = generator.average_styles.clone()
    generator.style_truncation = 0.7
    torch.testing.assert_close(
        generator.styles(latents, LABELS)[:, 0], expected[LABELS] + 0.7 * (styles - expected[LABELS])
    )
    assert torch.equal(generator.average_styles, kept)


def test_networks_start_without_kinks_and_take_samples_without_levels() -> None:
    config = config_of()
    discriminator = build_discriminator(config.discriminator, SHAPE)
    assert check_finite_differences(discriminator, config, SHAPE) == []
    images = torch.randn(2, CHANNELS, SIDE, SIDE)
    four = discriminator(images.repeat(1, 4, 1, 1), LABELS[:2])
    assert torch.equal(discriminator(images, LABELS[:2]), four)
    generator = build_generator(config.generator, SHAPE)
    latents = torch.randn(2, LATENT)
    assert generator(latents, LABELS[:2]).shape == (2, 4 * CHANNELS, SIDE, SIDE)
    last = generator.eval()(latents, LABELS[:2])
    torch.testing.assert_close(generator.synthesize(generator.styles(latents, LABELS[:2]), latents), last)


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"patch_size": 3}, ["patch_size = 3", "resolution = 8"]), ({"heads": 3}, ["heads = 3", "width = 16"]),
     ({"depth": 6}, ["depth = 6", "multiple of 4"])],
)  # fmt: skip
def test_sizes_that_do_not_fit(section: dict[str, int], expected: list[str]) -> None:
    config = config_of().generator
    with pytest.raises(UserError) as raised:
        build_generator(type(config).model_validate({**config.model_dump(), **section}), SHAPE)
    assert all(part in str(raised.value) for part in expected)


def test_levels_of_both_networks_agree() -> None:
    values = config_of().model_dump()
    values["discriminator"] = {"architecture": "r3gan"}
    with pytest.raises(UserError, match=r"discriminator\.architecture.*levels"):
        parse_config(values)
    with pytest.raises(UserError, match=r"objective\.gradient_penalty.*levels"):
        config_of(r1=None, r2=None, gradient_penalty={})


def test_a_saved_network_has_the_tables_that_its_constructor_computes() -> None:
    """Built without memory, as exports and checkpoints are loaded: positions and rotations are not saved."""
    config = config_of()
    expected = build_generator(config.generator, SHAPE)
    with torch.device("meta"):
        loaded = build_generator(config.generator, SHAPE)
    assign_weights(loaded, expected.state_dict(), lambda: build_generator(config.generator, SHAPE))
    latents = torch.randn(2, LATENT)
    assert torch.equal(loaded.eval()(latents, LABELS[:2]), expected.eval()(latents, LABELS[:2]))


def test_a_run_is_loaded_and_exported(tmp_path: Path) -> None:
    pack("builtin:digits", tmp_path / "digits", workers=1)
    values = config_of().model_dump(mode="json")
    values["data"] |= {"path": str(tmp_path / "digits"), "channels": 1, "num_workers": 0}
    values |= {"run_dir": str(tmp_path / "run")}
    train(parse_config(values))
    generator = load_generator(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "exported")
    images = generator(generator.latents(2), generator.labels(2))
    assert images.shape == (2, 1, SIDE, SIDE)
    assert torch.equal(load_generator(tmp_path / "exported")(generator.latents(2), generator.labels(2)), images)


class InputGradient:
    """A penalty of a user's, by automatic differentiation of what `view.judge` returns."""

    def __call__(self, view: Any) -> Tensor:
        points = view.fakes.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(view.judge(points, view.labels).sum(), points, create_graph=True)
        penalty: Tensor = gradient.square().sum()
        return penalty


def test_a_users_term_differentiates_attention_twice() -> None:
    term = {"term": f"{__name__}:InputGradient", "player": "discriminator"}
    config = config_of(r1=None, r2=None, terms=[term])
    generator, discriminator = networks(config)
    latents, reals = torch.randn(BATCH, LATENT).double(), torch.randn(BATCH, CHANNELS, SIDE, SIDE).double()
    batch = MicroBatch(torch.arange(BATCH), latents, LABELS, reals, LABELS)
    loss, parts = DiscriminatorObjective(discriminator, generator, config, None)(batch, 0, 0)
    loss.backward()
    assert parts["loss/discriminator.InputGradient"] > 0
    assert all(parameter.grad is not None for parameter in discriminator.blocks.parameters())  # type: ignore[operator]
