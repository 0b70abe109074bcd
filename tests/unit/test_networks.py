from __future__ import annotations

import pytest
import torch
from torch import nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.normalisation import BatchNorm
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
    generator = build_generator(GeneratorConfig(width=4, normalisation="none"), shape)
    discriminator = build_discriminator(DiscriminatorConfig(width=4, normalisation="none"), shape)
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
