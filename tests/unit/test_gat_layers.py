"""GAT's noise of levels, and its norm in both precisions."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from distgan.losses.level_noise import add_level_noise, noise_levels
from distgan.networks.gat.discriminator import GATDiscriminator
from distgan.networks.gat.generator import GATGenerator
from distgan.networks.gat.layers import RootMeanSquareNorm
from distgan.networks.shape import SampleShape


def test_noise_of_levels() -> None:
    assert noise_levels(4) == pytest.approx([0.885, 0.76, 0.51, 0.01])
    # Each level alone has noise of its share; and a level's noise is the next one's, faded, and more.
    noise = torch.randn(4000, 4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = add_level_noise(torch.zeros_like(noise), noise)
    assert found.std((0, 2, 3, 4)).tolist() == pytest.approx(noise_levels(4), rel=0.02)
    between = (found[:, 0] * found[:, 1]).mean() / found[:, 1].square().mean()
    assert between.item() == pytest.approx((1 - 0.885) / (1 - 0.76), rel=0.05)


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_the_norm_in_float32_is_torchs(eps: float | None) -> None:
    own, other = RootMeanSquareNorm(16, eps=eps), nn.RMSNorm(16, eps=eps)
    weights = torch.randn(16, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for norm in (own, other):
        norm.weight.data.copy_(weights)
        found = norm(vectors)
        found.square().sum().backward()
        gradients.append((found, norm.weight.grad))
    assert all(torch.equal(one, another) for one, another in zip(*gradients, strict=True))


def test_networks_in_bfloat16_give_no_warning() -> None:
    shape = SampleShape("latents", resolution=8, channels=4, num_classes=2, shift=(0.0,) * 4, scale=(1.0,) * 4)
    sizes = {"width": 16, "depth": 4, "heads": 2}
    generator, discriminator = GATGenerator(shape, 6, **sizes), GATDiscriminator(shape, **sizes)
    labels = torch.tensor([0, 1])
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        logits = discriminator(generator(torch.randn(2, 6), labels), labels)
        logits.sum().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
