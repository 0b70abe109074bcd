"""A discriminator's convolutions as a representation: against the layers called by hand, and for all architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig
from distgan.errors import UserError
from distgan.networks import build_discriminator
from distgan.networks.representation import convolution_features
from distgan.networks.shape import SampleShape


def build(channels: int = 3, resolution: int = 32, num_classes: int = 0, **settings: Any) -> nn.Module:
    shape = SampleShape(resolution=resolution, channels=channels, num_classes=num_classes)
    return build_discriminator(DiscriminatorConfig(**settings), shape, seed=1).eval()


def images(count: int, channels: int = 3, resolution: int = 32) -> Tensor:
    return torch.randn(count, channels, resolution, resolution, generator=torch.Generator().manual_seed(0))


def test_dcgan_layer_by_layer() -> None:
    """16x16, 8x8 and 4x4 maps of 8, 16 and 32 channels, each after its normalization and LeakyReLU."""
    network = build(width=8, normalization="batch")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) or hasattr(module, "running_mean"):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr, operator]
    expected, current = [], images(5)
    layers = network.layers
    assert isinstance(layers, nn.Sequential)
    for number, layer in enumerate(layers):
        current = layer(current)
        if number + 1 == len(layers) or isinstance(layers[number + 1], nn.Conv2d):
            assert isinstance(layer, nn.LeakyReLU)
            side = current.shape[2] // 4
            windows = current.unfold(2, side, side).unfold(3, side, side)
            expected.append(windows.amax((4, 5)).flatten(1).clone())
    found = convolution_features(network, images(5))
    assert [part.shape[1] for part in expected] == [8 * 16, 16 * 16, 32 * 16]
    assert torch.equal(found, torch.cat(expected, 1))


def test_the_papers_network_has_the_papers_number_of_features() -> None:
    """CIFAR-10: six convolutions of 128, 128, 256, 256, 512 and 512 channels, 28,672 numbers in all."""
    layers: list[nn.Module] = []
    width = 3
    for after, stride in ((128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2)):
        layers += [nn.Conv2d(width, after, 3, stride=stride, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        width = after

    class Paper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8192, 1))

        def forward(self, inputs: Tensor, _labels: Tensor | None) -> Tensor:
            logits: Tensor = self.layers(inputs)
            return logits

    assert convolution_features(Paper().eval(), images(2)).shape == (2, 28_672)


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        # Two 3x3 convolutions in each of four blocks.
        ({"architecture": "resnet", "width": 8, "normalization": "none"}, 8 * 8),
        ({"architecture": "resnet", "width": 8, "normalization": "layer", "spectral_norm": True}, 8 * 8),
        # 32 and 16 and 8 pixels: two each (4 to 8, 8 to 16, 16 to 32); the last 4x4 convolution leaves one pixel.
        ({"architecture": "progressive", "width": 4, "normalization": "none"}, 4 + 8 + 8 + 16 + 16 + 32 + 32),
        ({"architecture": "dcgan", "width": 8, "normalization": "virtual", "reference_size": 6}, 8 + 16 + 32),
        ({"architecture": "dcgan", "width": 8, "normalization": "none", "minibatch_stddev": {"group_size": 2}}, 56),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_any_architecture(settings: dict[str, Any], channels: int) -> None:
    network = build(**settings)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = convolution_features(network, images(4))
    assert found.shape == (4, 16 * channels)
    assert found.isfinite().all()
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(convolution_features(network, images(4)), found)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_r3gan_has_only_its_grouped_convolutions() -> None:
    network = build(architecture="r3gan", width=16, max_width=32, normalization="none")
    grouped = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert convolution_features(network, images(2)).shape[1] == 16 * sum(m.out_channels for m in grouped)


def test_networks_without_convolutions() -> None:
    class Dense(nn.Module):
        def forward(self, inputs: Tensor, _labels: Tensor | None) -> Tensor:
            return F.relu(inputs).sum((1, 2, 3))

    with pytest.raises(UserError, match="no convolution"):
        convolution_features(Dense(), images(2))
