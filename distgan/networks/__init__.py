"""Generators and discriminators, built from a config section and the shape of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig, GeneratorConfig, NetworkConfig
from distgan.errors import UserError
from distgan.networks.shape import SampleShape
from distgan.randomness import derive_key


def build_generator(config: GeneratorConfig, shape: SampleShape, *, seed: int = 0) -> nn.Module:
    """Build the generator: latents (n, latent_size) float32, labels (n,) int64 or None -> samples (n, *shape.sizes).

    Its initial weights are a function of the seed.

    Raises:
        UserError: the architecture does not support samples of this shape, or its code is not allowed.
    """
    with _seeded(seed, "generator"):
        return _module(config, config.build(shape, config.latent_size))


def build_discriminator(config: DiscriminatorConfig, shape: SampleShape, *, seed: int = 0) -> nn.Module:
    """Build the discriminator: samples (n, *shape.sizes), labels (n,) int64 or None -> logits (n,).

    Its attribute `feature_layer`, if it has one, names the submodule that outputs the last features before the logit.
    """
    with _seeded(seed, "discriminator"):
        return _module(config, config.build(shape))


def assign_weights(network: nn.Module, weights: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> None:
    """Give a network on the meta device its weights, whose names and shapes the caller has checked.

    Args:
        build: builds the network with values, for buffers that are not saved and that its constructor computes.
    """
    network.load_state_dict(weights, assign=True)
    computed = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if computed:
        whole = build()
        for name in computed:
            module, _, key = name.rpartition(".")
            setattr(network.get_submodule(module), key, whole.get_buffer(name))


def _module(config: NetworkConfig, built: object) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise UserError(f"{config.architecture}: returned {type(built).__name__}, expected a torch.nn.Module")
    return built


@contextmanager
def _seeded(seed: int, role: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_key(seed, f"initial weights/{role}"))
        yield
