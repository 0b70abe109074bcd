from __future__ import annotations

import math
import typing
from typing import Any

import pytest
import torch
from torch import nn

from distgan.config import DiscriminatorConfig, GeneratorConfig, MinibatchDiscriminationConfig
from distgan.config.architectures import Normalization
from distgan.networks import build_discriminator, build_generator
from distgan.networks.hooks import captured
from distgan.networks.layers.minibatch import MinibatchDiscrimination
from distgan.networks.layers.normalization import normalization_parameters
from distgan.networks.layers.spectral_norm import NORMALIZED, SpectralNorm
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.shape import SampleShape

RING = SampleShape("points", dimensions=2)


def generator_of(shape: SampleShape = RING, **settings: Any) -> nn.Module:
    settings = {"normalization": "none", "latent_size": 2, **settings}
    return build_generator(GeneratorConfig(architecture="mlp", **settings), shape)


def discriminator_of(shape: SampleShape = RING, **settings: Any) -> nn.Module:
    return build_discriminator(DiscriminatorConfig(architecture="mlp", **{"normalization": "none", **settings}), shape)


def test_the_toy_networks_of_wgan_gp() -> None:
    """gan_toy.py: 2 -> 512 -> 512 -> 512 -> 2, and the same to 1, with ReLU between."""
    for network, outputs in ((generator_of(width=512), 2), (discriminator_of(width=512), 1)):
        dense = [module for module in network.modules() if isinstance(module, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in dense] == [
            (2, 512), (512, 512), (512, 512), (512, outputs),
        ]  # fmt: skip
        for layer in dense[:-1]:
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.in_features), rel=0.05)
            assert layer.weight.abs().max().item() <= math.sqrt(6 / layer.in_features)
        assert dense[-1].weight.std().item() == pytest.approx(math.sqrt(2 / (512 + outputs)), rel=0.1)
        assert not any(layer.bias.any() for layer in dense)
        x = torch.randn(5, 2)
        hidden = x
        for layer in dense[:-1]:
            hidden = (hidden @ layer.weight.T + layer.bias).clamp_min(0)
        expected = hidden @ dense[-1].weight.T + dense[-1].bias
        torch.testing.assert_close(network(x), expected.squeeze(1) if outputs == 1 else expected)


@pytest.mark.parametrize("normalization", typing.get_args(Normalization))
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_normalization_depth_and_labels(normalization: str, num_classes: int) -> None:
    shape = SampleShape("points", dimensions=4, num_classes=num_classes)
    settings = {"normalization": normalization, "depth": 2, "width": 8}
    if normalization == "virtual":
        settings["reference_size"] = 3
    generator, discriminator = generator_of(shape, **settings), discriminator_of(shape, **settings)
    labels = torch.tensor([0, 2, 1, 1, 2]) if num_classes else None
    latents = torch.randn(5, 2)
    with reference_moments(generator), reference_moments(discriminator):
        points = generator(latents, labels)
        logits = discriminator(points, labels)
        if labels is not None:
            assert not torch.equal(generator(latents, labels.flip(0)), points)
            assert not torch.equal(discriminator(points, labels.flip(0)), logits)
    assert points.shape == (5, 4)
    assert logits.shape == (5,)
    for network in (generator, discriminator):
        assert len(normalization_parameters(network)) == (0 if normalization == "none" else 4)
        dense = [module for module in network.layers if isinstance(module, nn.Linear)]
        assert [layer.bias is not None for layer in dense] == [normalization in ("none", "layer")] * 2


def test_what_samples_are_compared_by() -> None:
    config = MinibatchDiscriminationConfig(kernels=4, dimensions=3)
    discriminator = discriminator_of(width=8, minibatch_discrimination=config)
    assert isinstance(discriminator.minibatch_discrimination, MinibatchDiscrimination)
    with captured(discriminator, discriminator.feature_layer) as outputs:
        logits = discriminator(torch.randn(6, 2))
    assert outputs[0].shape == (6, 8)
    compared = discriminator.minibatch_discrimination(outputs[0])
    assert compared.shape == (6, 12)
    torch.testing.assert_close(discriminator.logit(compared).squeeze(1), logits)


def test_spectral_norm_is_on_every_weight() -> None:
    shape = SampleShape("points", dimensions=2, num_classes=3)
    for network in (generator_of(shape, spectral_norm=True), discriminator_of(shape, spectral_norm=True)):
        layers = [module for module in network.modules() if isinstance(module, NORMALIZED)]
        assert sum(isinstance(module, SpectralNorm) for module in network.modules()) == len(layers) == 5
