"""Every recipe of configs/ trains: two steps at reduced widths here, at its full size among the slow tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from distgan.config import Config, load_config
from distgan.data.packing.pack import pack
from tests.latents import CHANNELS, SIDE, latent_shards, moments
from tests.ranks import Job
from tests.runs import rows, status

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SOURCES = {"images": "builtin:digits", "text": "builtin:text", "points": "builtin:ring"}
QUICK = ("data.num_workers=0", "monitoring.every=1", "monitoring.num_samples=4", "monitoring.tensorboard=false")
SMALL = ("generator.width=8", "discriminator.width=8", "training.batch_size=8", "ema.statistics_samples=16")

REDUCED = [path for path in RECIPES if not path.stem.startswith("imagenet256-gat") or path.stem.endswith("b2")]
"""GAT's sizes are equal at reduced widths."""
FULL = [path for path in RECIPES if not path.stem.startswith("imagenet256-gat")]
"""A step of GAT takes hours here. test_gat_recipes.py builds its networks without memory."""
ROLES = "generator", "discriminator"

Shards = Callable[[str], Path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Small data of a kind, packed when first asked for."""
    packed: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in packed:
            packed[kind] = tmp_path_factory.mktemp(kind) / "shards"
            if kind == "latents":
                latent_shards(packed[kind], moments(64), classes=4)
            else:
                pack(SOURCES[kind], packed[kind], workers=1)
        return packed[kind]

    return of


@pytest.mark.parametrize("path", REDUCED, ids=lambda path: path.stem)
def test_a_recipe_trains_at_reduced_widths(path: Path, tmp_path: Path, shards: Shards) -> None:
    config = load_config(path)
    overrides = list(SMALL)
    widest = [role for role in ROLES if "max_width" in type(getattr(config, role).options).model_fields]
    overrides += [f"{role}.max_width=16" for role in widest]
    if path.stem.startswith("cifar10-biggan"):
        # Four times as many channels: at 32 the discriminator tells digits from noise in a step, and has no gradient.
        overrides = [change.replace("width=8", "width=2") for change in overrides]
    if config.generator.architecture == "gat":  # a width is a multiple of 4 heads
        overrides += [f"{role}.{size}" for role in ROLES for size in ("heads=2", "depth=4")]
    if config.data.resolution > 64:
        overrides.append("data.resolution=64")
        if config.generator.architecture == "biggan":  # its attention is at half of the resolution
            overrides += ["generator.attention=[32]", "discriminator.attention=[32]"]
    if config.generator.architecture == "r3gan":
        overrides += ["generator.group_width=16", "discriminator.group_width=16"]
    if config.training.extra_critic_steps is not None:
        overrides.append("training.extra_critic_steps.updates=3")
    if config.training.gradient_accumulation_steps > 2:
        overrides.append("training.gradient_accumulation_steps=2")
    if config.growth is not None:
        overrides.append("growth.batch_sizes={}")
    train_two_steps(path, config, shards(config.data.kind), tmp_path, *overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_recipe_trains_at_its_full_size(path: Path, tmp_path: Path, shards: Shards) -> None:
    config = load_config(path)
    train_two_steps(path, config, shards(config.data.kind), tmp_path)


def train_two_steps(path: Path, config: Config, shards: Path, folder: Path, *overrides: str) -> None:
    """Through the command line, as a user would; both players must have learned something finite."""
    run, log = folder / "run", folder / "log"
    if config.data.kind == "latents":
        overrides += (f"data.channels={CHANNELS}", f"data.resolution={SIDE}", "data.decoder=null")
        overrides += ("evaluation.metrics=null", "evaluation.real_images=null")
    if config.objective.reconstruction is not None:  # the discriminator trains from there on
        overrides += ("objective.reconstruction.adversarial_start_kimg=0",)
    changes = [f"run_dir={run}", f"data.path={shards}", "training.steps=2", "evaluation.every=0", *QUICK, *overrides]
    assert Job(1, ["train", str(path), *changes], log=log).wait(timeout=1500) == [0], log.read_text()
    assert (status(run)["outcome"], status(run)["step"]) == ("finished", 2)
    first, second = rows(run)
    for row in (first, second):
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert row["skipped_updates/generator"] == row["skipped_updates/discriminator"] == 0
        assert row["gradient_norm/generator"] > 0
        assert row["gradient_norm/discriminator"] > 0
    assert second["images"] > first["images"] >= config.training.critic_steps
