"""Residual networks against the papers' tables, and against the papers' blocks written out in their own order."""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.hooks import captured
from distgan.networks.layers.normalization import BatchNorm, ConditionalNormalization, recompute_statistics
from distgan.networks.layers.residual import DiscriminatorBlock, FirstBlock, GeneratorBlock, plain_normalization
from distgan.networks.layers.spectral_norm import NORMALIZED, SpectralNorm
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.resnet import ResNetDiscriminator, ResNetGenerator
from distgan.networks.shape import SampleShape


def generator_of(resolution: int, *, num_classes: int = 0, **settings: Any) -> ResNetGenerator:
    shape = SampleShape(resolution=resolution, channels=3, num_classes=num_classes)
    network = build_generator(GeneratorConfig(architecture="resnet", latent_size=128, **settings), shape)
    assert isinstance(network, ResNetGenerator)
    return network


def discriminator_of(resolution: int, *, num_classes: int = 0, **settings: Any) -> ResNetDiscriminator:
    shape = SampleShape(resolution=resolution, channels=3, num_classes=num_classes)
    settings = {"normalization": "none", **settings}
    network = build_discriminator(DiscriminatorConfig(architecture="resnet", **settings), shape)
    assert isinstance(network, ResNetDiscriminator)
    return network


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes(resolution: int, num_classes: int) -> None:
    generator = generator_of(resolution, num_classes=num_classes, width=2)
    discriminator = discriminator_of(resolution, num_classes=num_classes, width=2)
    labels = torch.tensor([0, 2]) if num_classes else None
    images = generator(torch.randn(2, 128), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1
    with captured(discriminator, discriminator.feature_layer) as outputs:
        logits = discriminator(images, labels)
    assert logits.shape == (2,)
    assert outputs[0].shape == (2, 2 if resolution == 32 else 32)


@pytest.mark.parametrize("width", [128, 256])
def test_generators_at_32_by_their_numbers(width: int) -> None:
    """WGAN-GP's has 128 channels throughout, SNGAN's 256. With the released codes' biases of convolutions before batch
    norms, 9 * 256 numbers without effect, the latter would be of 4,276,739 numbers."""
    first = 128 * 16 * width + 16 * width
    block = 2 * (width * width * 9) + width * width + 2 * (width + width)
    last = (width + width) + 3 * width * 9 + 3
    total = sum(parameter.numel() for parameter in generator_of(32, width=width).parameters())
    assert total == first + 3 * block + last
    assert width != 256 or total + 9 * 256 == 4_276_739


@pytest.mark.parametrize("spectral", [True, False])
def test_discriminators_at_32_by_their_numbers(spectral: bool) -> None:
    """WGAN-GP's and SNGAN's, both of 128 channels; the latter's logit has no bias."""
    discriminator = discriminator_of(32, width=128, spectral_norm=spectral)
    first_block = (3 * 128 * 9 + 128) + (128 * 128 * 9 + 128) + (3 * 128 + 128)
    down_block = 2 * (128 * 128 * 9 + 128) + (128 * 128 + 128)
    plain_block = 2 * (128 * 128 * 9 + 128)
    logit = 128 + (not spectral)
    assert sum(p.numel() for p in discriminator.parameters()) == first_block + down_block + 2 * plain_block + logit
    assert not any(isinstance(module, BatchNorm) for module in discriminator.modules())
    # 32 -> 16 -> 8, and two blocks that keep it, whose shortcuts are the identity.
    blocks = list(discriminator.features)[:4]
    assert [type(block.shortcut) is nn.Identity for block in blocks] == [False, False, True, True]
    sizes = [32]
    for block in blocks:
        sizes.append(block(torch.zeros(1, 3 if sizes == [32] else 128, sizes[-1], sizes[-1])).shape[-1])
    assert sizes == [32, 16, 8, 8, 8]


TABLES = {
    64: ([1024, 512, 256, 128, 64], [64, 128, 256, 512, 1024], 2),
    128: ([1024, 1024, 512, 256, 128, 64], [64, 128, 256, 512, 1024, 1024], 4),
    256: ([1024, 1024, 512, 512, 256, 128, 64], [64, 128, 256, 512, 512, 1024, 1024], 4),
}
"""Channels of the generator from 4x4 on, of the discriminator's blocks, and its last size."""


@pytest.mark.parametrize("resolution", TABLES)
def test_sngans_tables(resolution: int) -> None:
    up, down, last = TABLES[resolution]
    with torch.device("meta"):
        generator, discriminator = generator_of(resolution), discriminator_of(resolution, spectral_norm=True)
    assert generator.projection.out_features == up[0] * 16
    found = [(block.first.in_channels, block.first.out_channels) for block in generator.blocks]
    assert found == list(pairwise(up))
    # In the generator a block's first convolution changes the width, in the discriminator its second one.
    assert [(b.second.in_channels, b.second.out_channels) for b in generator.blocks] == [(w, w) for w in up[1:]]
    blocks = [module for module in discriminator.features if isinstance(module, DiscriminatorBlock)]
    assert [(b.residual[2].in_channels, b.residual[2].out_channels) for b in blocks] == [(w, w) for w in down[:-1]]
    assert [(b.residual[5].in_channels, b.residual[5].out_channels) for b in blocks] == list(pairwise(down))
    assert isinstance(discriminator.features[0], FirstBlock)
    assert discriminator.features[0].residual[0].out_channels == down[0]
    halvings = sum(isinstance(module, nn.AvgPool2d) for module in discriminator.modules())
    assert resolution >> halvings == last
    assert discriminator.logit.bias is not None


def test_the_widest_channels_are_bounded() -> None:
    """WGAN-GP's generator at 64 pixels is SNGAN's with at most 512: 512x4x4, then 512, 256, 128, 64."""
    with torch.device("meta"):
        generator = generator_of(64, max_width=512)
    assert generator.projection.out_features == 512 * 16
    assert [block.second.out_channels for block in generator.blocks] == [512, 256, 128, 64]


def batch_norm(layer: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=1e-5)


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)


def enlarged(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def mean_pooled(x: Tensor) -> Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def with_biases(network: nn.Module) -> nn.Module:
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return network.double()


def test_a_generators_block_in_the_papers_order() -> None:
    normalize = functools.partial(plain_normalization, "synchronized")
    block = with_biases(GeneratorBlock(3, 4, normalize, inner_bias=True, bias=True))
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    hidden = conv(block.first, enlarged(batch_norm(block.first_norm, x).relu()))
    residual = conv(block.second, batch_norm(block.second_norm, hidden).relu())
    torch.testing.assert_close(block(x), residual + conv(block.shortcut, enlarged(x)))


@pytest.mark.parametrize("halve", [True, False])
@pytest.mark.parametrize("after", [3, 4])
def test_a_discriminators_block_in_the_papers_order(halve: bool, after: int) -> None:
    block = with_biases(DiscriminatorBlock(3, after, "none", halve=halve))
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    residual = conv(block.residual[5], conv(block.residual[2], x.relu()).relu())
    shortcut = x if after == 3 and not halve else conv(block.shortcut, x)
    expected = mean_pooled(residual) + mean_pooled(shortcut) if halve else residual + shortcut
    torch.testing.assert_close(block(x), expected)


def test_a_discriminators_first_block_in_the_papers_order() -> None:
    block = with_biases(FirstBlock(3, 4))
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    residual = mean_pooled(conv(block.residual[2], conv(block.residual[0], x).relu()))
    torch.testing.assert_close(block(x), residual + conv(block.shortcut, mean_pooled(x)))


def test_layer_norm_stands_before_each_rectifier_but_in_the_first_block() -> None:
    discriminator = discriminator_of(32, width=4, normalization="layer")
    assert sum(isinstance(module, nn.GroupNorm) for module in discriminator.modules()) == 6
    assert not any(isinstance(module, nn.GroupNorm) for module in discriminator.features[0].modules())


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_the_logit_is_linear_in_pooled_features_plus_the_projection(pooling: str) -> None:
    discriminator = discriminator_of(32, width=4, num_classes=3, pooling=pooling).double()
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([2, 0, 2])
    with captured(discriminator, "features.4") as outputs:
        logits = discriminator(images, labels)
    positions = outputs[0].flatten(2)
    assert positions.shape == (3, 4, 64)
    assert (positions >= 0).all(), "a ReLU comes before the pooling"
    for sample, label, logit in zip(positions, labels, logits, strict=True):
        features = sample.sum(1) if pooling == "sum" else sample.sum(1) / 64
        expected = discriminator.logit.weight[0] @ features + discriminator.logit.bias[0]
        torch.testing.assert_close(logit, expected + discriminator.embedding.weight[label] @ features)


def test_labels_choose_the_scales_of_both_norms_of_each_block_and_not_of_the_last() -> None:
    generator = generator_of(32, width=2, num_classes=3)
    conditional = [module for module in generator.modules() if isinstance(module, ConditionalNormalization)]
    assert len(conditional) == 6
    assert isinstance(generator.output[0], BatchNorm)
    assert torch.equal(generator.output[0].weight, torch.ones(2))
    assert torch.equal(conditional[0].gain.weight, torch.zeros(3, 2)), "scales of 1"
    latents = torch.randn(4, 128)
    labels = torch.tensor([0, 1, 2, 0])
    alike = generator(latents, labels)
    assert torch.allclose(alike, generator(latents, labels.flip(0)), atol=1e-6), "classes start alike"
    for layer in conditional:
        nn.init.normal_(layer.gain.weight)
    assert not torch.allclose(generator(latents, labels), generator(latents, labels.flip(0)))


@pytest.mark.parametrize("normalization", ["synchronized", "batch", "layer", "virtual", "none"])
def test_every_normalization_with_classes(normalization: str) -> None:
    settings = {"normalization": normalization, "width": 2}
    if normalization == "virtual":
        settings["reference_size"] = 4
    generator = generator_of(32, num_classes=2, **settings)
    discriminator = discriminator_of(32, num_classes=2, **settings)
    labels = torch.tensor([0, 1, 1])
    with reference_moments(generator), reference_moments(discriminator):
        logits = discriminator(generator(torch.randn(3, 128), labels), labels)
    logits.sum().backward()
    for network in (generator, discriminator):
        missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        assert not missing


def test_statistics_of_a_conditional_generator() -> None:
    generator = generator_of(32, width=2, num_classes=3)
    batch = torch.randn(16, 128), torch.arange(16) % 3
    recompute_statistics(generator, [batch])
    training = generator(*batch)
    torch.testing.assert_close(generator.eval()(*batch), training, rtol=1e-4, atol=1e-5)


def test_glorots_uniform_weights() -> None:
    """Bounds sqrt(6 / (fan in + fan out)), times sqrt(2) for the 3x3 convolutions of blocks; biases 0."""
    generator, discriminator = generator_of(32, width=64), discriminator_of(32, width=64, num_classes=10)
    for network in (generator, discriminator):
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)):
                outputs, inputs = layer.weight.shape[:2]
                positions = layer.weight[0, 0].numel()
                gain = math.sqrt(2.0) if positions == 9 and "output" not in name else 1.0
                bound = gain * math.sqrt(6 / ((inputs + outputs) * positions))
                assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.1)
                assert layer.weight.abs().max().item() <= bound
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3.0), rel=0.15)
                assert getattr(layer, "bias", None) is None or not layer.bias.any()


def test_spectral_norm_is_on_every_weight() -> None:
    for network in (
        generator_of(32, width=2, num_classes=3, spectral_norm=True),
        discriminator_of(32, width=2, num_classes=3, spectral_norm=True),
    ):
        layers = [module for module in network.modules() if isinstance(module, NORMALIZED)]
        assert sum(isinstance(module, SpectralNorm) for module in network.modules()) == len(layers)
    assert discriminator_of(64, width=2, spectral_norm=True).logit.bias is not None


@pytest.mark.parametrize("resolution", [4, 16, 512])
def test_other_resolutions_are_refused(resolution: int) -> None:
    for build in (generator_of, discriminator_of):
        with pytest.raises(UserError, match=f"data.resolution = {resolution}: .* supports 32, 64, 128, 256"):
            build(resolution)
