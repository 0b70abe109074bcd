"""Networks, each built from its config section and the shape of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from distgan.randomness import derive_key

GENERATORS = {"dcgan": DCGANGenerator}
DISCRIMINATORS = {"dcgan": DCGANDiscriminator}


def build_generator(
    config: GeneratorConfig, *, resolution: int, channels: int, num_classes: int = 0, seed: int = 0
) -> nn.Module:
    """The generator: latents (n, latent_size) float32, labels (n,) int64 or None -> images (n, C, R, R) in [-1, 1].

    Its initial weights are a function of the seed alone.
    """
    return _build(
        GENERATORS[config.architecture], "generator", seed, resolution=resolution, channels=channels,
        num_classes=num_classes, latent_size=config.latent_size, width=config.width, max_width=config.max_width,
        normalisation=config.normalisation,
    )  # fmt: skip


def build_discriminator(
    config: DiscriminatorConfig, *, resolution: int, channels: int, num_classes: int = 0, seed: int = 0
) -> nn.Module:
    """The discriminator: images (n, C, R, R) in [-1, 1], labels (n,) int64 or None -> logits (n,)."""
    return _build(
        DISCRIMINATORS[config.architecture], "discriminator", seed, resolution=resolution, channels=channels,
        num_classes=num_classes, width=config.width, max_width=config.max_width, normalisation=config.normalisation,
    )  # fmt: skip


def _build(network: type[nn.Module], role: str, seed: int, *, resolution: int, **arguments: Any) -> nn.Module:
    if not 16 <= resolution <= 256:
        raise UserError(
            f"data.resolution = {resolution}: the dcgan {role} takes powers of two from 16 to 256; "
            "choose one of these, the images are resized to it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_key(seed, f"initial weights/{role}"))
        return network(resolution=resolution, **arguments)
