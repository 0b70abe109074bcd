"""Every recipe of configs/ has what the paper that it names says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from distgan.config import ScheduleConfig, load_config

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def both(key: str, value: Any) -> dict[str, Any]:
    """A value of both players."""
    return {f"generator.{key}": value, f"discriminator.{key}": value}


DECAY = ScheduleConfig(start=2e-4, end=0)
"""Linear, over the whole run."""
TENTH = ScheduleConfig(start=0.5, end=0.05, shape="cosine")

PAPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar10-dcgan": (
        "Radford et al. 2016",
        {"generator.architecture": "dcgan", "objective.adversarial": "non_saturating", "training.batch_size": 128,
         "generator.latent_size": 100, **both("optimizer.learning_rate", 2e-4),
         **both("optimizer.betas", (0.5, 0.999))},
    ),
    "mnist-dcgan": (
        "Radford et al. 2016",
        {"generator.architecture": "dcgan", "objective.adversarial": "non_saturating", "training.batch_size": 128,
         "generator.latent_size": 100, **both("optimizer.learning_rate", 2e-4),
         **both("optimizer.betas", (0.5, 0.999)), "data.labels": True},
    ),
    "stacked-mnist-dcgan": (
        "Lin et al. 2018",
        {**both("architecture", "dcgan"), "objective.adversarial": "non_saturating", "training.batch_size": 64,
         "generator.latent_size": 100, "generator.latent_distribution": "uniform", **both("width", 64),
         **both("optimizer.learning_rate", 2e-4), **both("optimizer.betas", (0.5, 0.999)),
         "training.steps": 50 * 128_000 // 64, "data.labels": False, "generated_samples": 26_000},
    ),
    "cifar10-sngan": (
        "Miyato et al. 2018",
        {**both("architecture", "resnet"), "objective.adversarial": "hinge", "training.critic_steps": 5,
         **both("optimizer.learning_rate", DECAY), **both("optimizer.betas", (0.0, 0.9)), "training.steps": 50_000,
         "training.batch_size": 64, "generator.latent_size": 128, "generator.latent_distribution": "normal",
         "generator.width": 256, "discriminator.width": 128, "discriminator.spectral_norm": True,
         "discriminator.normalization": "none", "discriminator.pooling": "sum", "objective.gradient_penalty": None},
    ),
    # test_biggan_recipes has every number of these three.
    "cifar10-biggan": ("Brock et al. 2019", both("architecture", "biggan")),
    "imagenet128-biggan": ("Brock et al. 2019", both("architecture", "biggan")),
    "cifar10-cgan-pd": ("Miyato and Koyama 2018", {**both("architecture", "resnet"), "data.labels": True}),
    "cifar10-wgan-gp": (
        "Gulrajani et al. 2017",
        {**both("architecture", "resnet"), "objective.adversarial": "wasserstein", "training.critic_steps": 5,
         "objective.gradient_penalty.weight": 10, **both("optimizer.learning_rate", DECAY),
         **both("optimizer.betas", (0.0, 0.9)), "training.steps": 100_000,
         "training.batch_size": 64, "generator.latent_size": 128, "generator.latent_distribution": "normal",
         **both("width", 128), "discriminator.normalization": "none", "discriminator.pooling": "mean"},
    ),
    "text-wgan-gp": (
        "Gulrajani et al. 2017",
        {"objective.adversarial": "wasserstein", "objective.gradient_penalty.weight": 10, "training.critic_steps": 10,
         **both("optimizer.learning_rate", 1e-4), **both("optimizer.betas", (0.5, 0.9)), **both("width", 512),
         "generator.latent_size": 128, "training.batch_size": 64, "training.steps": 200_000, "data.length": 32},
    ),
    "digits-wgan-gp": (
        "Gulrajani et al. 2017",
        {"objective.adversarial": "wasserstein", "objective.gradient_penalty.weight": 10, "training.critic_steps": 5,
         **both("optimizer.betas", (0.0, 0.9)), "discriminator.normalization": "layer", "training.batch_size": 64},
    ),
    "digits-wgan": (
        "Arjovsky et al. 2017",
        # Ten times the paper's learning rate of 5e-5; the long critic phases are those of the released code.
        {"objective.adversarial": "wasserstein", "objective.weight_clipping.limit": 0.01, "training.critic_steps": 5,
         **both("optimizer.name", "rmsprop"), **both("optimizer.learning_rate", 5e-4), "training.batch_size": 64,
         "training.extra_critic_steps.updates": 100, "training.extra_critic_steps.first": 25,
         "training.extra_critic_steps.every": 500},
    ),
    "digits-progressive": (
        "Karras et al. 2018",
        {**both("architecture", "progressive"), "objective.adversarial": "wasserstein",
         "objective.gradient_penalty.weight": 10, "objective.drift": 0.001, "training.batch_size": 16,
         **both("optimizer.learning_rate", 1e-3), **both("optimizer.betas", (0.0, 0.99)),
         "discriminator.minibatch_stddev.group_size": 4, "training.critic_steps": 1,
         "generator.latent_distribution": "normal"},
    ),
    "digits-r3gan": (
        "Huang et al. 2024",
        {**both("architecture", "r3gan"), **both("normalization", "none"),
         "objective.adversarial": "relativistic_paired",
         # The paper's penalties fall to a tenth.
         "objective.r1.gamma": TENTH, "objective.r2.gamma": TENTH},
    ),
    "digits-autoencoder": (
        "Rombach et al. 2022",
        {"generator.architecture": "autoencoder", "discriminator.architecture": "patchgan",
         "objective.adversarial": "hinge", "objective.reconstruction.kl": 1e-6,
         "objective.reconstruction.adaptive": True, **both("optimizer.betas", (0.5, 0.9))},
    ),
    "digits-gat": (
        "Hyun et al. 2026",
        {**both("architecture", "gat"), "objective.adversarial": "relativistic_paired",
         **{f"objective.{name}.method": "finite_difference" for name in ("r1", "r2")},
         **{f"objective.{name}.gamma": 0.1 for name in ("r1", "r2")},
         **{f"objective.{name}.sigma": 0.01 for name in ("r1", "r2")},
         **{f"objective.{name}.antithetic": False for name in ("r1", "r2")},
         **both("optimizer.betas", (0.0, 0.99)), **both("optimizer.max_gradient_norm", 1.0),
         "training.generator_reals": "last", "training.generator_latents": "last"},
    ),
    # Their numbers are those of the released presets: see test_r3gan_recipes.py.
    **{
        f"{data}-r3gan": ("Huang et al. 2024", both("architecture", "r3gan"))
        for data in ("cifar10", "ffhq64", "ffhq256", "imagenet32", "imagenet64")
    },
    # Their numbers are those of the released script: see test_gat_recipes.py.
    **{
        f"imagenet256-gat-{size}": ("Hyun et al. 2026", both("architecture", "gat"))
        for size in ("s2", "b2", "l2", "xl2")
    },
    # Their numbers are those of the released presets: see test_stylegan2_recipes.py.
    "cifar10-stylegan2": ("Karras et al. 2020", both("architecture", "stylegan2")),
    "stylegan2-256": ("Karras et al. 2020", both("architecture", "stylegan2")),
    "digits-feature-matching": ("Salimans et al. 2016", {"objective.feature_matching.weight": 1.0}),
    "digits-minibatch-discrimination": (
        "Salimans et al. 2016",
        {"discriminator.minibatch_discrimination.kernels": 100, "discriminator.minibatch_discrimination.dimensions": 5},
    ),
    "digits-vbn": (
        "Salimans et al. 2016",
        {"generator.normalization": "virtual", "objective.label_smoothing.real": 0.9,
         "objective.label_smoothing.fake": 0.0},
    ),
    "digits-minimax": ("Goodfellow et al. 2014", {"objective.adversarial": "minimax"}),
    "digits-dcgan": (
        "Radford et al. 2016", {"generator.architecture": "dcgan", "objective.adversarial": "non_saturating"},
    ),
    # Points of the protocol, of the generator as it is.
    "ring": ("Lin et al. 2018", {"data.kind": "points", "evaluation.num_samples": 2500, "ema.half_life_kimg": 0}),
}  # fmt: skip
"""Which paper each recipe is after, and what it has of it."""


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_names_its_paper_and_has_what_is_published(name: str) -> None:
    # A small one alone: its large ones are of other data.
    path = FOLDER / f"{name}.yaml"
    path = path if path.exists() else FOLDER / f"{name}-small.yaml"
    paper, published = PAPERS[name]
    config = load_config(path)
    assert config.run_dir == f"runs/{path.stem}"
    comment = " ".join(line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#"))
    assert paper in " ".join(comment.split())
    for key, value in published.items():
        path = "objective.adversarial.family" if key == "objective.adversarial" else key
        assert functools.reduce(getattr, path.split("."), config) == value, key


OVER_THE_RUN: dict[str, Any] = {
    "rate": "{start: 1e-3, end: 2.5e-4, shape: cosine}",
    "betas": "[0, {start: 0.9, end: 0.99, shape: cosine}]",
    "objective": {
        "objective.augmentation.probability": "{start: 0, end: 0.55, shape: cosine}",
        **{f"objective.{key}.gamma": "{start: 0.05, end: 0.005, shape: cosine}" for key in ("r1", "r2")},
    },
}
"""R3GAN's curves over a shorter run, with five times the rates."""


@pytest.mark.parametrize(
    ("name", "changed"),
    [("cifar10-dcgan", {}),
     *((name, {"training.generator_batch_size": "null"}) for name in ("cifar10-sngan", "cifar10-wgan-gp")),
     ("text-wgan-gp", {"training.critic_steps": 5, **both("optimizer.learning_rate", 1e-3)}),
     ("cifar10-biggan", {}), ("cifar10-cgan-pd", {}),
     ("cifar10-stylegan2", {"training.kimg": "null", "training.steps": 200000, "training.batch_size": 32,
                            "training.mixed_precision": "no", "discriminator.minibatch_stddev.group_size": 8,
                            "objective.augmentation.controller.kimg": 100}),
     ("cifar10-r3gan", {"training.kimg": "null", "training.steps": 200000, "training.batch_size": 64,
                        "training.mixed_precision": "no", **both("optimizer.betas", OVER_THE_RUN["betas"]),
                        **both("optimizer.learning_rate", OVER_THE_RUN["rate"]), **OVER_THE_RUN["objective"]})],
)  # fmt: skip
def test_a_small_recipe_trains_as_its_large_one(name: str, changed: dict[str, Any]) -> None:
    """Sizes, lengths and what is measured differ; the objective, the kinds of layers and the optimizers do not."""
    path = FOLDER / f"{name}-small.yaml"
    assert load_config(path).run_dir == f"runs/{path.stem}"
    small = load_config(path).model_dump()
    large = load_config(FOLDER / f"{name}.yaml", [f"{key}={value}" for key, value in changed.items()]).model_dump()
    assert small["objective"] == large["objective"]
    assert small["training"] | {"steps": 0} == large["training"] | {"steps": 0}
    for role in ("generator", "discriminator"):
        sizes = dict.fromkeys(("width", "max_width", "depth", "latent_size", "style_size"))
        assert small[role] | sizes == large[role] | sizes
        assert small[role]["width"] < large[role]["width"]
    assert small["training"]["steps"] < large["training"]["steps"]


def test_every_recipe_is_held_against_a_paper_or_its_large_one() -> None:
    assert {path.stem.removesuffix("-small") for path in RECIPES} == PAPERS.keys()
