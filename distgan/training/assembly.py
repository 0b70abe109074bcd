"""Builds a run's state from its config, on this rank's device."""

from __future__ import annotations

import torch
from torch import Tensor

from distgan.config import Config
from distgan.data.index import Index
from distgan.data.samples import sample_format
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.latents import LatentSource
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import sample_shape
from distgan.training.ema import AveragedGenerator
from distgan.training.player import DiscriminatorObjective, GeneratorObjective, Player
from distgan.training.state import Progress, TrainingState, class_counts


def assemble(config: Config, index: Index, runtime: Runtime) -> TrainingState:
    """Networks with weights from the seed, players, and the average, at step 0."""
    shape = sample_shape(config.data, num_classes=index.num_classes, vocabulary=len(index.vocabulary or ()))
    generator = build_generator(config.generator, shape, seed=config.seed).to(runtime.device)
    discriminator = build_discriminator(config.discriminator, shape, seed=config.seed).to(runtime.device)
    average = AveragedGenerator(generator)
    for network in (generator, discriminator, average.network):
        if uses_channels_last(config, runtime.device):
            network.to(memory_format=torch.channels_last)
    if config.training.compile:
        generator.compile()
        discriminator.compile()
    precision = torch.bfloat16 if config.training.mixed_precision == "bf16" else None
    players = {
        "generator": GeneratorObjective(generator, discriminator, config.objective, precision),
        "discriminator": DiscriminatorObjective(discriminator, generator, config.objective, precision),
    }
    optimizers = {"generator": config.generator.optimizer, "discriminator": config.discriminator.optimizer}
    wrapped = {role: Player(role, objective, optimizers[role], runtime) for role, objective in players.items()}
    if runtime.world_size > 1:
        reals, latents, labels = _blank_inputs(config, index, runtime)
        wrapped["discriminator"].settle((reals, labels, latents, labels, False))
        wrapped["generator"].settle((latents, labels))
    return TrainingState(config, index, wrapped["generator"], wrapped["discriminator"], average, Progress())


def latent_source(config: Config, index: Index, device: torch.device) -> LatentSource:
    """Where this run's latents and labels come from."""
    counts = class_counts(index) if config.data.labels else None
    return LatentSource(config.generator, config.seed, class_counts=counts, device=device)


def uses_channels_last(config: Config, device: torch.device) -> bool:
    """Whether convolutions run in channels_last: as configured; `auto` is where it was measured to be faster."""
    if config.training.channels_last != "auto":
        return config.training.channels_last
    if config.data.channels == 1:
        return False
    return device.type == "cuda" or config.training.mixed_precision == "bf16"


def check_fits(config: Config, index: Index, world_size: int) -> None:
    """Refuse combinations of config, data and processes that cannot train. Raises UserError."""
    sample_format(config.data, index)
    batch, accumulation = config.training.batch_size, config.training.accumulation
    if config.micro_batch % world_size:
        raise UserError(
            f"training.batch_size = {batch} with training.accumulation = {accumulation} does not divide among "
            f"{world_size} processes; choose a batch size that is a multiple of {world_size * accumulation}"
        )
    if config.data.labels and not index.num_classes:
        raise UserError(
            "data.labels = true, but the shards hold no labels; pack from class folders, or set data.labels=false"
        )


def _blank_inputs(config: Config, index: Index, runtime: Runtime) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zeros in the shape of a rank's micro-batch: reals, latents, and labels if there are classes."""
    share, side, device = config.micro_batch // runtime.world_size, config.data.resolution, runtime.device
    reals = torch.zeros(share, config.data.channels, side, side, device=device)
    latents = torch.zeros(share, config.generator.latent_size, device=device)
    labels = torch.zeros(share, dtype=torch.int64, device=device) if config.data.labels else None
    return reals, latents, labels
