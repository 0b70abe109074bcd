"""Settings of recipes against the numbers of their released code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from distgan import schedule
from distgan.config import ScheduleConfig, load_config, parse_config
from distgan.errors import UserError

FOLDER = Path(__file__).parents[2] / "configs"
DECAY = ScheduleConfig(start=2e-4, end=0)

RELEASED: dict[str, dict[str, tuple[Any, str]]] = {
    # igul222/improved_wgan_training, gan_cifar_resnet.py; its class conditioning is off for the score of table 3.
    "cifar10-wgan-gp": {
        "training.batch_size": (64, "line 36: BATCH_SIZE"),
        "training.generator_batch_size": (2 * 64, "line 37: GEN_BS_MULTIPLE = 2"),
        "training.steps": (100_000, "line 38: ITERS"),
        "generator.width": (128, "line 39: DIM_G"),
        "discriminator.width": (128, "line 40: DIM_D"),
        "generator.normalization": ("synchronized", "line 41: NORMALIZATION_G, over one GPU's part there"),
        "discriminator.normalization": ("none", "line 42: NORMALIZATION_D = False"),
        "generator.optimizer.learning_rate": (DECAY, "lines 44-45: LR, DECAY"),
        "training.critic_steps": (5, "line 46: N_CRITIC"),
        "data.dequantize": (True, "uniform in [0, 1/128) is added to 2 (x/256 - 0.5)"),
    },
    # pfnet-research/sngan_projection, configs/sn_cifar10_unconditional.yml
    "cifar10-sngan": {
        "training.batch_size": (64, "line 2: batchsize"),
        "training.steps": (50_000, "line 3: iteration"),
        "generator.optimizer.learning_rate": (DECAY, "line 4: iteration_decay_start: 0; line 36: alpha"),
        "generator.latent_size": (128, "line 16: dim_z"),
        "generator.width": (256, "line 18: ch"),
        "discriminator.width": (128, "line 26: ch"),
        "generator.optimizer.betas": ((0.0, 0.9), "lines 37-38"),
        "training.critic_steps": (5, "line 44: n_dis"),
        "training.generator_batch_size": (128, "line 45: n_gen_samples"),
    },
    # kwotsin/mimicry, README.md and nets/gan/cgan.py, where a generator update has as many samples as a real batch.
    "cifar10-cgan-pd": {
        "training.batch_size": (64, "README.md, CIFAR-10"),
        "training.generator_batch_size": (None, "cgan.py, BaseGenerator.train_step"),
        "training.steps": (100_000, "README.md, CIFAR-10"),
        "training.critic_steps": (5, "README.md, CIFAR-10"),
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_recipe_has_the_numbers_of_its_code(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    for key, (value, source) in RELEASED[name].items():
        assert functools.reduce(getattr, key.split("."), config) == value, (key, source)


PRESETS: dict[str, tuple[int, dict[int, int], dict[int, float]]] = {
    "v1-1gpu": (16, {256: 14, 512: 6, 1024: 3}, {}),
    "v2-1gpu": (4, {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8, 512: 4}, {1024: 0.0015}),
    "v2-2gpus": (
        8, {4: 256, 8: 256, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8}, {512: 0.0015, 1024: 0.002},
    ),
    "v2-4gpus": (
        16, {4: 512, 8: 256, 16: 128, 32: 64, 64: 32, 128: 16}, {256: 0.0015, 512: 0.002, 1024: 0.003},
    ),
    "v2-8gpus": (
        32, {4: 512, 8: 256, 16: 128, 32: 64, 64: 32}, {128: 0.0015, 256: 0.002, 512: 0.003, 1024: 0.003},
    ),
}  # fmt: skip
"""tkarras/progressive_growing_of_gans, config.py, presets: minibatch_base, minibatch_dict, and G_lrate_dict, which is
D_lrate_dict too. Without an entry, train.py takes minibatch_base, and the rate 0.001."""


@pytest.mark.parametrize("preset", PRESETS)
def test_batches_and_rates_of_progressive_growing(preset: str) -> None:
    """The code looks up the exact resolution; here an entry also holds for higher ones."""
    base, batches, rates = PRESETS[preset]
    network = {"architecture": "progressive", "normalization": "none", "optimizer": {"learning_rate": 1e-3}}
    sections: dict[str, Any] = {
        "run_dir": "r", "data": {"path": "d", "resolution": 1024}, "generator": network, "discriminator": network,
        "training": {"kimg": 12_000, "batch_size": base}, "growth": {"batch_sizes": batches, "learning_rates": rates},
    }  # fmt: skip
    config = parse_config(sections)
    for level in range(9):
        side = 4 << level
        images = 1200_000 * level - (300_000 if level else 0)  # in the middle of its fade
        assert schedule.resolution(config, images) == side
        assert schedule.batch_size(config, images) == batches.get(side, base)
        rate = schedule.rate_at_resolution(config, images)
        for player in (config.generator, config.discriminator):
            settings = schedule.optimizer_settings(player.optimizer, 0, images, 1, rate)
            assert settings["lr"] == rates.get(side, 0.001)
    with pytest.raises(UserError, match=r"growth\.learning_rates: 2048 is above data\.resolution = 1024"):
        parse_config({**sections, "growth": {"learning_rates": {2048: 1e-3}}})
    with pytest.raises(UserError, match=r"growth\.learning_rates: 12 is not a power of two"):
        parse_config({**sections, "growth": {"learning_rates": {12: 1e-3}}})
