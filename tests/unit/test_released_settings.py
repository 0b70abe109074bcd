"""Settings of recipes against the numbers of their released code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from distgan.config import ScheduleConfig, load_config

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
