"""Checks of runs that train an autoencoder, and of discriminators of patches."""

from __future__ import annotations

from typing import Protocol

from distgan.config.data import DataConfig
from distgan.config.evaluation import MetricConfig
from distgan.config.objective import ObjectiveConfig
from distgan.config.players import DiscriminatorConfig, GeneratorConfig, GrowthConfig
from distgan.config.training import TrainingConfig


class Run(Protocol):
    """What the checks look at of a `Config`, which imports them."""

    data: DataConfig
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    objective: ObjectiveConfig
    training: TrainingConfig
    growth: GrowthConfig | None

    @property
    def metrics(self) -> list[MetricConfig]:
        """What evaluations measure."""


def check_reconstruction(run: Run) -> None:
    """Raise ValueError if an autoencoder lacks its loss, or the loss its autoencoder, or something does not fit it."""
    check_patches(run.discriminator, run.objective)
    generator, objective, data = run.generator, run.objective, run.data
    if objective.reconstruction is None:
        if generator.facts.reconstructs:
            raise ValueError(
                f"objective.reconstruction: missing, which generator.architecture: {generator.architecture} needs; set "
                "objective.reconstruction={}"
            )
        return
    if generator.is_allowed and not generator.facts.reconstructs:
        raise ValueError(
            f"objective.reconstruction: generator.architecture: {generator.architecture} makes samples of latents, and "
            "reconstructs none; choose autoencoder, or leave objective.reconstruction out"
        )
    if data.kind != "images":
        raise ValueError(f"data.kind: {data.kind}: an autoencoder reconstructs images; set data.kind=images")
    if generator.latent_distribution != "normal":
        raise ValueError(
            f"generator.latent_distribution: {generator.latent_distribution}: the noise of an autoencoder's latents is "
            "normal; set generator.latent_distribution=normal"
        )
    for key, found, value in (
        ("data.labels", data.labels, "false"),
        ("data.dequantize", data.dequantize, "false"),
        ("growth", run.growth is not None, "null"),
        ("objective.feature_matching", objective.feature_matching is not None, "null"),
        ("training.compile", run.training.compile, "false"),
    ):
        if found:
            raise ValueError(f"{key}: does not work with objective.reconstruction; set {key}={value}")
    if objective.reconstruction.perceptual is not None and data.resolution < 16:
        raise ValueError(
            f"objective.reconstruction.perceptual: LPIPS needs 16 pixels per side, found data.resolution = "
            f"{data.resolution}; set objective.reconstruction.perceptual=null"
        )
    for metric in run.metrics:
        if "generator" in metric.inputs:
            raise ValueError(
                f"evaluation.metrics: {metric.metric} draws samples of the generator, but an autoencoder reconstructs "
                "those of the data; remove it"
            )


def check_patches(discriminator: DiscriminatorConfig, objective: ObjectiveConfig) -> None:
    """Raise ValueError if the discriminator judges patches, and a part of the objective is of one logit per sample."""
    if not discriminator.facts.judges_patches:
        return
    for key in ("r1", "r2", "gradient_penalty", "label_smoothing"):
        if getattr(objective, key) is not None:
            raise ValueError(
                f"objective.{key}: is of one logit per sample, but {discriminator.architecture} has one per patch; set "
                f"objective.{key}=null, or choose another discriminator.architecture"
            )
