"""The recipes of StyleGAN2 against the released presets, number by number (NVlabs/stylegan2-ada-pytorch, d72cc7d)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distgan.config import load_config
from distgan.config.objective.augmentation import AdaOptions
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.minibatch import MinibatchStddev
from distgan.networks.shape import sample_shape
from distgan.networks.stylegan2.discriminator import StyleGAN2Discriminator
from distgan.networks.stylegan2.generator import StyleGAN2Generator
from distgan.players.optimizers import build_optimizer
from distgan.schedule import ema_decay, optimizer_settings

CONFIGS = Path(__file__).parents[2] / "configs"


class Preset(NamedTuple):
    """What train.py sets for a preset; source lines stand behind the values."""

    kimg: int
    batch: int
    group: int
    base: int
    """Channels are min(base / r, 512) at r pixels."""
    gamma: float
    ema: int
    ramp: float | None
    mapping: int
    path_length: float
    style_mixing: float
    residual: bool
    ada: bool
    resolution: int
    data: dict[str, Any]
    said: list[str]
    """What the comment says of results and of what is left out."""


PRESETS = {
    "cifar10-stylegan2": Preset(
        kimg=100_000, batch=64, group=32, base=32768, gamma=0.01, ema=500, ramp=0.05, mapping=2,  # train.py:160, 178
        path_length=0, style_mixing=0, residual=False, ada=True,  # 196-198
        # README.md:208, train.py:451: unmirrored, class-conditional. FID and IS: score_sde, table 3; paper, figure 11.
        resolution=32, data={"labels": True, "mirror": False},
        said=["FID of 2.42", "10.14", "2.92 and 9.83", "100 million images", "2 GPUs", "adaptive augmentation"],
    ),
    "stylegan2-256": Preset(
        kimg=25_000, batch=64, group=8, base=16384, gamma=1, ema=20, ramp=None, mapping=8,  # train.py:157, 178
        path_length=2, style_mixing=0.9, residual=True, ada=False,  # loss.py:24, networks.py:594
        # FID: clean-fid's table, 70,000 images; the model ffhq-res256-mirror-paper256-noaug. Time: README.md:291.
        resolution=256, data={"labels": False, "mirror": True},
        said=["FID of 3.66", "25 million images", "35 hours", "8 V100", "without augmentation"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_is_its_released_preset(name: str) -> None:
    preset = PRESETS[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.run_dir == f"runs/{name}"
    assert {key: getattr(config.data, key) for key in preset.data} == preset.data
    assert (config.data.resolution, config.data.channels) == (preset.resolution, 3)
    assert (config.training.steps, config.training.kimg) == (None, preset.kimg)
    assert (config.training.batch_size, config.training.critic_steps) == (preset.batch, 1)
    assert config.training.mixed_precision == "bf16"  # float16 there, line 181
    # training_loop.py:299-301: a half-life of `ramp` times the images, up to `ema`.
    for images in (0, 1_000_000, 5_000_000, 10_000_000, 25_000_000):
        half_life = 1000 * preset.ema if preset.ramp is None else min(1000 * preset.ema, preset.ramp * images)
        expected = 0.5 ** (preset.batch / half_life) if half_life else 0.0
        assert ema_decay(config.ema, images, preset.batch, length=1) == pytest.approx(expected, abs=1e-12)
    assert config.generator.latent_size == config.generator.options.style_size == 512  # 176
    assert config.generator.latent_distribution == "normal"  # training_loop.py:263
    assert config.generator.options.mapping_layers == preset.mapping
    assert config.generator.options.style_mixing == preset.style_mixing
    assert config.evaluation.num_samples == 50_000

    objective = config.objective
    assert objective.adversarial.family == "non_saturating"  # loss.py:67, 99, 115
    assert objective.r1 is not None
    assert (objective.r1.gamma, objective.r1.every) == (preset.gamma, 16)
    terms = [(t.term, t.player, t.weight, t.every, t.options.decay, t.options.shrink) for t in objective.terms]
    expected = ("path_length", "generator", preset.path_length, 4, 0.01, 2)  # loss.py:24, training_loop.py:106
    assert terms == ([expected] if preset.path_length else [])
    if preset.ada:  # train.py:233, 265; training_loop.py:108-111
        found = objective.augmentation
        assert found is not None
        assert (found.augmentation, found.probability, found.options) == ("ada", "adaptive", AdaOptions())
        assert (found.controller.target, found.controller.every, found.controller.kimg) == (0.6, 4, 500)
    else:
        assert objective.augmentation is None
    assert objective.r2 is None
    assert objective.gradient_penalty is None
    assert not objective.drift

    comment = " ".join(line.removeprefix("# ") for line in (CONFIGS / f"{name}.yaml").read_text().splitlines()[:12])
    assert all(part in comment for part in preset.said)


@pytest.mark.parametrize("name", PRESETS)
def test_networks_are_those_of_the_preset(name: str) -> None:
    preset = PRESETS[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    shape = sample_shape(config.data, num_classes=10)
    with torch.device("meta"):
        generator = build_generator(config.generator, shape)
        discriminator = build_discriminator(config.discriminator, shape)
    assert isinstance(generator, StyleGAN2Generator)
    assert isinstance(discriminator, StyleGAN2Discriminator)
    sides = [4 << level for level in range(preset.resolution.bit_length() - 2)]
    widths = [min(preset.base // side, 512) for side in sides]
    assert [layer.convolution.weight.shape[1] for layer in generator.to_image] == widths
    falling = [discriminator.from_image[0].weight.shape[0]]
    falling += [block.second[0].weight.shape[0] for block in discriminator.blocks]
    assert falling == widths[::-1]
    assert all((block.skip is not None) == preset.residual for block in discriminator.blocks)
    assert isinstance(discriminator.features[0], MinibatchStddev)
    assert discriminator.features[0].group_size == preset.group
    assert (discriminator.mapping is not None) == preset.data["labels"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("role", "interval"), [("generator", 4), ("discriminator", 16)])  # training_loop.py:106, 107
def test_rates_and_betas_are_scaled_for_lazy_regularization(name: str, role: str, interval: int) -> None:
    """training_loop.py:202-205, of Adam (0, 0.99) with a rate of 0.0025: train.py:157, 160, 185."""
    config = getattr(load_config(CONFIGS / f"{name}.yaml"), role).optimizer
    share = interval / (interval + 1)
    assert optimizer_settings(config, 1000, 64_000, 10**6) == {"lr": pytest.approx(0.0025 * share, rel=1e-12)}
    (group,) = build_optimizer(config, [torch.nn.Parameter(torch.ones(1))]).param_groups
    assert group["betas"] == pytest.approx((0, 0.99**share), rel=1e-12)
    assert group["eps"] == 1e-8
