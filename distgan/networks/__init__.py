"""Generators and discriminators, built from a config section and the shape of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distgan.config import DiscriminatorConfig, GeneratorConfig, NetworkConfig
from distgan.networks.characters import CharacterDiscriminator, CharacterGenerator
from distgan.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from distgan.networks.layers.virtual_batch_norm import add_reference, uses_reference
from distgan.networks.mlp import MLPDiscriminator, MLPGenerator
from distgan.networks.progressive import ProgressiveDiscriminator, ProgressiveGenerator
from distgan.networks.r3gan import R3GANDiscriminator, R3GANGenerator
from distgan.networks.resnet import ResNetDiscriminator, ResNetGenerator
from distgan.networks.shape import SampleShape
from distgan.randomness import derive_key

GENERATORS: dict[str, Callable[[GeneratorConfig, SampleShape], nn.Module]] = {
    "dcgan": DCGANGenerator,
    "resnet": ResNetGenerator,
    "progressive": ProgressiveGenerator,
    "r3gan": R3GANGenerator,
    "mlp": MLPGenerator,
    "characters": CharacterGenerator,
}
DISCRIMINATORS: dict[str, Callable[[DiscriminatorConfig, SampleShape], nn.Module]] = {
    "dcgan": DCGANDiscriminator,
    "resnet": ResNetDiscriminator,
    "progressive": ProgressiveDiscriminator,
    "r3gan": R3GANDiscriminator,
    "mlp": MLPDiscriminator,
    "characters": CharacterDiscriminator,
}


def build_generator(config: GeneratorConfig, shape: SampleShape, *, seed: int = 0) -> nn.Module:
    """Build the generator: latents (n, latent_size) float32, labels (n,) int64 or None -> samples (n, *shape.sizes).

    Its initial weights are a function of the seed.

    Raises:
        UserError: the architecture does not support samples of this shape.
    """
    with _seeded(seed, "generator"):
        network = GENERATORS[config.architecture](config, shape)
    return _with_reference(network, config, (config.latent_size,), shape)


def build_discriminator(config: DiscriminatorConfig, shape: SampleShape, *, seed: int = 0) -> nn.Module:
    """Build the discriminator: samples (n, *shape.sizes), labels (n,) int64 or None -> logits (n,).

    Its attribute `feature_layer` names the submodule that outputs the last features before the logit.
    """
    with _seeded(seed, "discriminator"):
        network = DISCRIMINATORS[config.architecture](config, shape)
    return _with_reference(network, config, shape.sizes, shape)


def _with_reference(network: nn.Module, config: NetworkConfig, sizes: tuple[int, ...], shape: SampleShape) -> nn.Module:
    """Add a buffer for the reference batch if the network has virtual batch norm."""
    if uses_reference(network):
        assert config.reference_size is not None, "reference_size: filled in by the full config"
        add_reference(network, (config.reference_size, *sizes), labeled=shape.num_classes > 0)
    return network


@contextmanager
def _seeded(seed: int, role: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_key(seed, f"initial weights/{role}"))
        yield
