"""The character networks against the paper's figures and a plain numpy computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.characters import ResidualBlock
from distgan.networks.shape import SampleShape

SHAPE = SampleShape("text", length=32, vocabulary=100)


def generator(width: int = 8, shape: SampleShape = SHAPE, **changes: object) -> nn.Module:
    settings = {"architecture": "characters", "normalization": "none", "latent_size": 16, "width": width} | changes
    return build_generator(GeneratorConfig.model_validate(settings), shape)


def critic(width: int = 8, shape: SampleShape = SHAPE, **changes: object) -> nn.Module:
    settings = {"architecture": "characters", "normalization": "none", "width": width} | changes
    return build_discriminator(DiscriminatorConfig.model_validate(settings), shape)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_are_as_many_as_the_papers() -> None:
    """Counted by hand for 512 channels, 32 characters, 5 blocks and a vocabulary of 100."""
    blocks = 5 * 2 * (512 * 512 * 5 + 512)
    with torch.device("meta"):
        assert count(generator(512, latent_size=128)) == 128 * 512 * 32 + 512 * 32 + blocks + 512 * 100 + 100
        assert count(critic(512)) == 100 * 512 + 512 + blocks + 512 * 32 + 1
        assert count(critic(512, depth=2)) == 100 * 512 + 512 + blocks * 2 / 5 + 512 * 32 + 1


def test_text_is_a_distribution_at_each_place() -> None:
    text = generator()(torch.randn(3, 16))
    assert text.shape == (3, *SHAPE.sizes) == (3, 100, 32)
    assert (text >= 0).all()
    assert torch.allclose(text.sum(1), torch.ones(3, 32), atol=1e-6)
    assert critic()(text).shape == (3,)


def test_a_block_is_the_residual_of_two_convolutions() -> None:
    block = ResidualBlock(3).double()
    x = np.random.default_rng(0).normal(size=(3, 7))

    def convolve(layer: nn.Conv1d, signal: np.ndarray) -> np.ndarray:
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        padded = np.pad(signal, ((0, 0), (2, 2)))
        places = [(weight * padded[:, place : place + 5]).sum((1, 2)) for place in range(signal.shape[1])]
        return np.stack(places, 1) + bias[:, None]

    hidden = convolve(block.layers[1], np.maximum(x, 0))
    expected = x + 0.3 * convolve(block.layers[3], np.maximum(hidden, 0))
    given = torch.from_numpy(x)[None]
    assert np.allclose(block(given)[0].detach().numpy(), expected, atol=1e-12)
    assert np.array_equal(given[0].numpy(), x)


def test_weights_start_as_in_the_released_code() -> None:
    """Uniform with standard deviation sqrt(4 / (in + out)) for convolutions, sqrt(2 / (in + out)) for dense layers."""
    for network in (generator(64), critic(64)):
        for layer in network.modules():
            if not isinstance(layer, (nn.Conv1d, nn.Linear)):
                continue
            taps = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv1d) else 1
            fans = (layer.weight.shape[0] + layer.weight.shape[1]) * taps
            deviation = math.sqrt((4 if isinstance(layer, nn.Conv1d) else 2) / fans)
            bound = math.sqrt(3) * deviation
            assert layer.weight.abs().max() <= bound
            assert layer.weight.abs().max() > 0.99 * bound
            assert abs(layer.weight.std().item() / deviation - 1) < 0.05
            assert not layer.bias.any()


def test_the_gradients_slope_has_a_gradient() -> None:
    """What the gradient penalty needs, at a one-hot sample."""
    network = critic().double()
    text = torch.eye(100, dtype=torch.float64)[torch.randint(100, (2, 32))].transpose(1, 2).requires_grad_()
    (slope,) = torch.autograd.grad(network(text).sum(), text, create_graph=True)
    slope.flatten(1).norm(dim=1).sub(1).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.dim() > 1)


@pytest.mark.parametrize("build", [generator, critic])
def test_what_character_networks_do_not_have(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValidationError, match=r"normalization\s+Input should be 'none'"):
        build(normalization="synchronized")
    with pytest.raises(UserError, match=r"data\.labels = true"):
        build(shape=SampleShape("text", length=32, vocabulary=100, num_classes=3))


def test_spectral_norm_bounds_each_layer() -> None:
    network = critic(spectral_norm=True)
    assert network(generator()(torch.randn(2, 16))).shape == (2,)
    for layer in (network.characters, network.logit):
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert abs(largest.item() - 1) < 0.05
