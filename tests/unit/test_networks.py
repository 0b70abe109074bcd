from __future__ import annotations

import typing

import pytest
import torch
from torch import nn

from distgan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    MinibatchDiscriminationConfig,
    MinibatchStddevConfig,
)
from distgan.config.architectures import Normalization
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.hooks import captured
from distgan.networks.layers.minibatch import MinibatchDiscrimination, MinibatchStddev
from distgan.networks.layers.normalization import BatchNorm, normalization_parameters
from distgan.networks.layers.spectral_norm import NORMALIZED, SpectralNorm
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.shape import SampleShape


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes(resolution: int, channels: int, num_classes: int) -> None:
    shape = SampleShape(resolution=resolution, channels=channels, num_classes=num_classes)
    generator = build_generator(GeneratorConfig(width=2, latent_size=5), shape)
    discriminator = build_discriminator(DiscriminatorConfig(width=2), shape)
    labels = torch.tensor([0, 2]) if num_classes else None
    images = generator(torch.randn(2, 5), labels)
    assert images.shape == (2, channels, resolution, resolution)
    assert images.abs().max() <= 1
    assert discriminator(images, labels).shape == (2,)


def test_labels_change_what_comes_out() -> None:
    shape = SampleShape(resolution=16, channels=1, num_classes=3)
    generator = build_generator(GeneratorConfig(width=4, normalization="none"), shape)
    discriminator = build_discriminator(DiscriminatorConfig(width=4, normalization="none"), shape)
    latents = torch.randn(1, 100).expand(2, -1)
    images = generator(latents, torch.tensor([0, 1]))
    assert not torch.equal(images[0], images[1])
    logits = discriminator(images[:1].expand(2, -1, -1, -1), torch.tensor([0, 1]))
    assert logits[0] != logits[1]


def test_the_papers_generator_at_64() -> None:
    """Figure 1 of Radford et al.: 1024x4x4, 512x8x8, 256x16x16, 128x32x32, 3x64x64 from 100 numbers."""
    generator = build_generator(GeneratorConfig(width=128), SampleShape(resolution=64, channels=3))
    assert generator.projection.weight.shape == (1024 * 16, 100)
    convolutions = [m for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(1024, 512), (512, 256), (256, 128), (128, 3)]


def test_the_papers_guidelines() -> None:
    generator = build_generator(GeneratorConfig(), SampleShape(resolution=64, channels=3))
    discriminator = build_discriminator(DiscriminatorConfig(), SampleShape(resolution=64, channels=3))
    g, d = list(generator.layers), list(discriminator.layers)
    assert isinstance(g[-1], nn.Tanh)
    assert isinstance(g[-2], nn.ConvTranspose2d), "no batch norm at the output of G"
    assert isinstance(d[0], nn.Conv2d)
    assert isinstance(d[1], nn.LeakyReLU), "no batch norm at the input of D"
    assert {m.negative_slope for m in d if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert not any(isinstance(m, (nn.MaxPool2d, nn.AvgPool2d, nn.Upsample)) for m in (*g, *d))
    assert sum(isinstance(m, BatchNorm) for m in g) == 4
    assert sum(isinstance(m, BatchNorm) for m in d) == 3
    for module in (*generator.modules(), *discriminator.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.weight.numel() > 5000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.weight.mean().abs().item() < 0.001
        if isinstance(module, BatchNorm):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.4)
            assert not module.bias.any()


def test_initial_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    one = build_generator(GeneratorConfig(width=4), SampleShape(resolution=16, channels=1), seed=3)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = build_generator(GeneratorConfig(width=4), SampleShape(resolution=16, channels=1), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    other = build_generator(GeneratorConfig(width=4), SampleShape(resolution=16, channels=1), seed=4)
    assert torch.equal(one.projection.weight, two.projection.weight)
    assert not torch.equal(one.projection.weight, other.projection.weight)


@pytest.mark.parametrize("resolution", [4, 8, 512])
def test_other_resolutions_are_refused(resolution: int) -> None:
    with pytest.raises(UserError, match="powers of two from 16 to 256"):
        build_generator(GeneratorConfig(), SampleShape(resolution=resolution, channels=3))


def test_training_keeps_no_state_in_batch_norm() -> None:
    layer = BatchNorm(3, synchronized=True)
    layer(torch.randn(8, 3, 4, 4))
    assert not layer.running_mean.any()
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("normalization", typing.get_args(Normalization))
def test_other_normalizations_stand_where_batch_norm_does(normalization: str) -> None:
    shape = SampleShape(resolution=16, channels=1)
    settings = {"width": 4, "normalization": normalization}
    if normalization == "virtual":
        settings["reference_size"] = 3
    generator = build_generator(GeneratorConfig(latent_size=5, **settings), shape)
    discriminator = build_discriminator(DiscriminatorConfig(**settings), shape)
    with reference_moments(generator), reference_moments(discriminator):
        logits = discriminator(generator(torch.randn(2, 5)))
    assert logits.shape == (2,)
    assert logits.isfinite().all()
    normalized = normalization != "none"
    assert [tuple(p.shape) for p in normalization_parameters(generator)] == [(8,), (8,), (4,), (4,)] * normalized
    assert [tuple(p.shape) for p in normalization_parameters(discriminator)] == [(8,), (8,)] * normalized
    # A bias is there where it does something: at the ends of the networks, and where nothing centers its channel.
    biased = normalization in ("layer", "none")
    assert (generator.projection.bias is not None) == biased
    assert [c.bias is not None for c in generator.modules() if isinstance(c, nn.ConvTranspose2d)] == [biased, True]
    assert [c.bias is not None for c in discriminator.modules() if isinstance(c, nn.Conv2d)] == [True, biased]


def test_spectral_norm_is_on_every_weight_of_the_network_that_asks_for_it() -> None:
    shape = SampleShape(resolution=16, channels=1, num_classes=3)
    comparing = MinibatchDiscriminationConfig(kernels=3, dimensions=2)
    for network in (
        build_generator(GeneratorConfig(width=4, spectral_norm=True), shape),
        build_discriminator(
            DiscriminatorConfig(width=4, spectral_norm=True, minibatch_discrimination=comparing), shape
        ),
    ):
        layers = [module for module in network.modules() if isinstance(module, NORMALIZED)]
        assert sum(isinstance(module, SpectralNorm) for module in network.modules()) == len(layers) > 0
        for layer in layers:
            assert "weight" in layer.parametrizations
        for name, parameter in network.named_parameters():
            if name.endswith("weight.original") and parameter.numel() > 2000 and "embedding" not in name:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1), "what is divided is as initialized"


def test_what_samples_are_compared_by() -> None:
    shape = SampleShape(resolution=16, channels=1)
    config = DiscriminatorConfig(
        width=2,
        minibatch_discrimination=MinibatchDiscriminationConfig(kernels=3, dimensions=2),
        minibatch_stddev=MinibatchStddevConfig(group_size=2),
    )
    discriminator = build_discriminator(config, shape)
    stddev, discrimination = discriminator.minibatch_stddev, discriminator.minibatch_discrimination
    assert isinstance(stddev, MinibatchStddev)
    assert isinstance(discrimination, MinibatchDiscrimination)
    assert discrimination.projection.weight.shape == (3 * 2, (4 + 1) * 16)
    assert discriminator.logit.weight.shape == (1, (4 + 1) * 16 + 3)
    with captured(discriminator, discriminator.feature_layer) as outputs:
        logits = discriminator(torch.randn(4, 1, 16, 16))
    assert outputs[0].shape == (4, 4, 4, 4), "of each sample by itself"
    compared = discrimination(stddev(outputs[0]).flatten(1))
    torch.testing.assert_close(discriminator.logit(compared).squeeze(1), logits)


def test_nothing_is_added_to_what_is_stored_unless_asked_for() -> None:
    discriminator = build_discriminator(DiscriminatorConfig(width=2), SampleShape(resolution=16, channels=1))
    assert list(discriminator.state_dict()) == [
        "layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.3.weight", "layers.3.bias",
        "layers.3.running_mean", "layers.3.running_var", "logit.weight", "logit.bias",
    ]  # fmt: skip
