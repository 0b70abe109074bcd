"""R3GAN's networks against the paper's description, by hand."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.resampling import Downsample, Upsample
from distgan.networks.r3gan import ResidualBlock
from distgan.networks.shape import SampleShape

SETTINGS = {"architecture": "r3gan", "normalization": "none"}


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def block(width: int, group: int = 16) -> int:
    """1x1 to twice the width, 3x3 in groups, 1x1 back, and two biases of the expanded channels."""
    return width * 2 * width + 2 * width * group * 9 + 2 * width * width + 2 * 2 * width


def test_the_papers_cifar_networks() -> None:
    """Four stages of two blocks, 768 wide, 64 latents; no layer between stages of one width."""
    shape = SampleShape(resolution=32, channels=3)
    with torch.device("meta"):
        generator = build_generator(GeneratorConfig(**SETTINGS, width=768, max_width=768, latent_size=64), shape)
        discriminator = build_discriminator(DiscriminatorConfig(**SETTINGS, width=768, max_width=768), shape)
    assert count(generator) == 768 * 16 + 64 * 768 + 8 * block(768) + 768 * 3
    assert count(discriminator) == 3 * 768 + 8 * block(768) + 768 * 16 + 768


def test_the_papers_imagenet_networks() -> None:
    """1536 wide with 96 groups of 32 channels (train.py:231-238), 1,000 classes in 64 and 1536 dimensions."""
    shape, wide = SampleShape(resolution=32, channels=3, num_classes=1000), {"width": 1536, "max_width": 1536}
    with torch.device("meta"):
        generator = build_generator(GeneratorConfig(**SETTINGS, **wide, group_width=32, latent_size=64), shape)
        discriminator = build_discriminator(DiscriminatorConfig(**SETTINGS, **wide, group_width=32), shape)
    assert count(generator) == 1000 * 64 + 1536 * 16 + 128 * 1536 + 8 * block(1536, 32) + 1536 * 3
    assert count(discriminator) == 3 * 1536 + 8 * block(1536, 32) + 1536 * 16 + 1536 * 1536 + 1000 * 1536
    groups = {layer.groups for layer in generator.modules() if isinstance(layer, torch.nn.Conv2d)} - {1}
    assert groups == {96}


def test_label_vectors_begin_with_the_released_variance() -> None:
    """Weights of a dense layer on K one-hot labels: variance 1/K in G and 1/(K d) in D."""
    classes, width = 400, 64
    shape = SampleShape(resolution=8, channels=1, num_classes=classes)
    wide = {"width": width, "max_width": width}
    generator = build_generator(GeneratorConfig(**SETTINGS, **wide, latent_size=64), shape)
    discriminator = build_discriminator(DiscriminatorConfig(**SETTINGS, **wide), shape)
    # The spread of the estimate from 25,600 draws is 0.5 %.
    assert generator.embedding.weight.std().item() == pytest.approx(classes**-0.5, rel=0.02)
    assert discriminator.embedding.weight.std().item() == pytest.approx((classes * width) ** -0.5, rel=0.02)


@pytest.mark.parametrize("classes", [0, 3])
def test_shapes_and_widths(classes: int) -> None:
    shape = SampleShape(resolution=16, channels=1, num_classes=classes)
    generator = build_generator(GeneratorConfig(**SETTINGS, width=8, max_width=16, latent_size=5), shape)
    discriminator = build_discriminator(DiscriminatorConfig(**SETTINGS, width=8, max_width=16), shape)
    labels = torch.tensor([0, 2]) if classes else None
    images = generator(torch.randn(2, 5), labels)
    assert images.shape == (2, 1, 16, 16)
    assert discriminator(images, labels).shape == (2,)


def test_blocks_begin_as_the_identity() -> None:
    activations = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResidualBlock(8, 1.0)(activations), activations)


def test_resampling_by_hand() -> None:
    line = torch.tensor([1.0, 3.0, 5.0, 9.0])
    images = torch.outer(line, torch.ones(4))[None, None]
    # Rows: pixels 2i and 2i + 1 are (x[i - 1] + 3 x[i]) / 4 and (3 x[i] + x[i + 1]) / 4, with zeros beyond the border.
    up = Upsample()(images)
    assert up.shape == (1, 1, 8, 8)
    assert up[0, 0, :, 3].tolist() == pytest.approx([3 / 4, 6 / 4, 10 / 4, 14 / 4, 18 / 4, 24 / 4, 32 / 4, 27 / 4])
    # (x[2i - 1] + 3 x[2i] + 3 x[2i + 1] + x[2i + 2]) / 8, and of the columns, all ones, 7 / 8 beside the border.
    down = Downsample()(images)
    assert down.shape == (1, 1, 2, 2)
    assert down[0, 0, :, 1].tolist() == pytest.approx([(3 + 9 + 5) / 8 * 7 / 8, (3 + 15 + 27) / 8 * 7 / 8])


def test_resampling_shifts_nothing() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for resample in (Upsample(), Downsample()):
        for axis in (2, 3):
            torch.testing.assert_close(resample(images.flip(axis)), resample(images).flip(axis))


@pytest.mark.parametrize(("stages", "blocks"), [(2, 1), (4, 2)])
def test_weights_begin_as_in_fixup(stages: int, blocks: int) -> None:
    """Of L blocks of m = 3 layers, the first two begin L^(-1/(2m - 2)) as large as He's for LeakyReLU(0.2)."""
    width = 512
    shape = SampleShape(resolution=4 << (stages - 1), channels=3)
    network = build_discriminator(DiscriminatorConfig(**SETTINGS, width=width, max_width=width, depth=blocks), shape)
    found = [layer for layer in network.modules() if isinstance(layer, ResidualBlock)]
    assert len(found) == stages * blocks
    size = (stages * blocks) ** -0.25 * (2 / 1.04) ** 0.5
    for first, _, second, _, last in (list(block.layers) for block in found):
        assert first.weight.std().item() == pytest.approx(size / width**0.5, rel=0.02)
        assert second.weight.std().item() == pytest.approx(size / (16 * 9) ** 0.5, rel=0.02)
        assert not last.weight.any()


def test_penalties_can_be_differentiated() -> None:
    shape = SampleShape(resolution=8, channels=1)
    discriminator = build_discriminator(DiscriminatorConfig(**SETTINGS, width=8, max_width=8), shape)
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    (slopes,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    slopes.square().sum().backward()
    assert discriminator.logit[0].weight.grad is not None


@pytest.mark.parametrize("changes", [{"normalization": "batch"}, {"spectral_norm": True}])
def test_what_it_does_not_take_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        GeneratorConfig.model_validate({**SETTINGS, "width": 8, **changes})


def test_widths_are_multiples_of_a_group() -> None:
    config = GeneratorConfig.model_validate({**SETTINGS, "width": 12})
    with pytest.raises(UserError, match=r"generator\.group_width = 16: does not divide 24, .*r3gan generator"):
        build_generator(config, SampleShape(resolution=16, channels=1))
