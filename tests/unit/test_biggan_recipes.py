"""The recipes of BigGAN and cGAN-PD have every number of the code that they name; sources are file:line of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distgan.config import ScheduleConfig, load_config
from distgan.schedule import ema_decay

FOLDER = Path(__file__).parents[2] / "configs"

Published = tuple[Any, str]
"""A value, and where it is published."""


def both(key: str, value: Any, source: str) -> dict[str, Published]:
    return {f"generator.{key}": (value, source), f"discriminator.{key}": (value, source)}


BIGGAN = "ajbrock/BigGAN-PyTorch 98459431a5d6"
MIMICRY = "kwotsin/mimicry a7fda06c4aff"
TABLES: dict[str, dict[str, Published]] = {
    # scripts/launch_cifar_ema.sh of BIGGAN, and the defaults of its utils.py.
    "cifar10-biggan": {
        **both("architecture", "biggan", "utils.py:63"),
        "generator.latent_size": (128, "utils.py:96"),
        "generator.latent_distribution": ("normal", "utils.py:1089"),
        **both("width", 64, "utils.py:74,77"),
        **both("initialization", "normal", "launch_cifar_ema.sh:9, N02"),
        **both("optimizer.learning_rate", 2e-4, "launch_cifar_ema.sh:5"),
        **both("optimizer.betas", (0.0, 0.999), "utils.py:153-162"),
        **both("optimizer.eps", 1e-8, "utils.py:295"),
        **both("attention", (), "launch_cifar_ema.sh:8"),
        "generator.shared_size": (None, "utils.py:90, G_shared is off"),
        "generator.hierarchical": (False, "utils.py:101"),
        "objective.adversarial.family": ("hinge", "losses.py:31-32"),
        "objective.terms": ([], "launch_cifar_ema.sh:7"),
        "training.steps": (500 * (50_000 // (50 * 4)), "launch_cifar_ema.sh:4, train.py:131, utils.py:526"),
        "training.batch_size": (50, "launch_cifar_ema.sh:3"),
        "training.gradient_accumulation_steps": (1, "launch_cifar_ema.sh:4"),
        "training.critic_steps": (4, "launch_cifar_ema.sh:5"),
        "data.labels": (True, "BigGAN.py:230"),
        "data.resolution": (32, "utils.py:413"),
        "data.mirror": (False, "utils.py:546, augment is off"),
        "data.dequantize": (False, "utils.py:557-559"),
    },
    # scripts/launch_BigGAN_bs256x8.sh.
    "imagenet128-biggan": {
        **both("architecture", "biggan", "utils.py:63"),
        "generator.latent_size": (120, "launch_BigGAN_bs256x8.sh:12"),
        "generator.latent_distribution": ("normal", "utils.py:1089"),
        **both("width", 96, "launch_BigGAN_bs256x8.sh:14"),
        **both("attention", (64,), "launch_BigGAN_bs256x8.sh:6"),
        "generator.shared_size": (128, "launch_BigGAN_bs256x8.sh:10,12"),
        "generator.hierarchical": (True, "launch_BigGAN_bs256x8.sh:12"),
        **both("initialization", "orthogonal", "launch_BigGAN_bs256x8.sh:11"),
        "generator.optimizer.learning_rate": (1e-4, "launch_BigGAN_bs256x8.sh:5"),
        "discriminator.optimizer.learning_rate": (4e-4, "launch_BigGAN_bs256x8.sh:5"),
        **both("optimizer.betas", (0.0, 0.999), "utils.py:153,156, launch_BigGAN_bs256x8.sh:5"),
        **both("optimizer.eps", 1e-6, "launch_BigGAN_bs256x8.sh:8"),
        "objective.adversarial.family": ("hinge", "losses.py:31-32"),
        "objective.terms": ([], "launch_BigGAN_bs256x8.sh:9"),
        "training.steps": (150_000, "README.md:28"),
        "training.batch_size": (256 * 8, "launch_BigGAN_bs256x8.sh:3,4"),
        "training.gradient_accumulation_steps": (8, "launch_BigGAN_bs256x8.sh:4"),
        "training.critic_steps": (1, "launch_BigGAN_bs256x8.sh:5"),
        "data.labels": (True, "BigGAN.py:230"),
        "data.resolution": (128, "launch_BigGAN_bs256x8.sh:3"),
        "data.mirror": (False, "utils.py:546, augment is off"),
        "data.dequantize": (False, "utils.py:557-559"),
    },
    # README.md and torch_mimicry/nets/cgan_pd/cgan_pd_32.py of MIMICRY.
    "cifar10-cgan-pd": {
        **both("architecture", "resnet", "cgan_pd_32.py:13,83"),
        "generator.latent_size": (128, "cgan_pd_32.py:24"),
        "generator.latent_distribution": ("normal", "nets/gan/cgan.py:99"),
        "generator.width": (256, "cgan_pd_32.py:24"),
        "discriminator.width": (128, "cgan_pd_32.py:92"),
        "discriminator.normalization": ("none", "modules/resblocks.py, DBlock"),
        "discriminator.spectral_norm": (True, "modules/resblocks.py, DBlock"),
        "generator.spectral_norm": (False, "modules/resblocks.py, GBlock"),
        "discriminator.pooling": ("sum", "cgan_pd_32.py:132"),
        **both("optimizer.learning_rate", ScheduleConfig(start=2e-4, end=0, shape="linear"), "README.md:218"),
        **both("optimizer.betas", (0.0, 0.9), "README.md:218"),
        "objective.adversarial.family": ("hinge", "cgan_pd_base.py:24,43"),
        "training.steps": (100_000, "README.md:218"),
        "training.batch_size": (64, "README.md:218"),
        "training.critic_steps": (5, "README.md:218"),
        "ema.half_life_kimg": (0, "training/trainer.py, no average"),
        "data.labels": (True, "README.md:112"),
        "data.resolution": (32, "README.md:218"),
        "data.mirror": (False, "datasets/data_utils.py, load_cifar10_dataset"),
        "data.dequantize": (False, "datasets/data_utils.py, load_cifar10_dataset"),
    },
}  # fmt: skip
AVERAGES = {"cifar10-biggan": (0.9999, 1000), "imagenet128-biggan": (0.9999, 20_000)}
"""Decay of the average per step, and the step from which it is no longer the weights themselves: utils.py:284, and
`--ema_start` of the two scripts of BIGGAN."""

OURS = ("run_dir", "data.path", "data.num_workers", "checkpoint", "monitoring", "evaluation", "ema")
"""Keys that say where and how a run is seen; `ema` is held against AVERAGES."""


def leaves(values: Any, key: str = "") -> Iterator[str]:
    if isinstance(values, dict) and "start" not in values:
        for name, value in values.items():
            yield from leaves(value, f"{key}.{name}" if key else name)
    else:
        yield {"objective.adversarial": "objective.adversarial.family"}.get(key, key)


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_has_every_number_of_its_source(name: str) -> None:
    path, table = FOLDER / f"{name}.yaml", TABLES[name]
    config = load_config(path)
    for key, (value, source) in table.items():
        assert functools.reduce(getattr, key.split("."), _WithOptions(config)) == value, f"{key}: {source}"
    named = {key for key in leaves(yaml.safe_load(path.read_text())) if not key.startswith(OURS)}
    assert named <= table.keys(), "each key of the recipe has a source"


@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_decays_as_the_source_does(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    images = config.training.batch_size * config.training.critic_steps
    decay, first = AVERAGES[name]
    for step, expected in ((0, 0.0), (first - 1, 0.0), (first, decay), (10 * first, decay)):
        found = ema_decay(config.ema, step * images, images, length=1)
        assert found == pytest.approx(expected, abs=1e-9)


class _WithOptions:
    """A section whose networks show the options of their architecture, those by default too."""

    def __init__(self, section: Any) -> None:
        self._section = section

    def __getattr__(self, key: str) -> Any:
        options = getattr(self._section, "facts", None)
        found = getattr(options, key) if hasattr(options, key) else getattr(self._section, key)
        is_section = hasattr(type(found), "model_fields") and not isinstance(found, ScheduleConfig)
        return _WithOptions(found) if is_section else found
