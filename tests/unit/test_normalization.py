"""Normalization layers against hand computations."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor, nn

from distgan.config.architectures import Normalization
from distgan.networks.layers.normalization import (
    BatchNorm,
    ConditionalNormalization,
    build_normalization,
    centers_channels,
    normalization_parameters,
    recompute_statistics,
)
from distgan.networks.layers.virtual_batch_norm import add_reference, reference_moments, set_reference

KINDS = typing.get_args(Normalization)
SHAPES = [(6, 3), (6, 3, 4, 5)]


class Shifted(nn.Module):
    """A normalization after a bias, with a reference batch for those that need one."""

    def __init__(self, kind: str, shape: tuple[int, ...], num_classes: int = 0) -> None:
        super().__init__()
        self.layer = build_normalization(kind, shape[1], num_classes=num_classes)
        self.bias = nn.Parameter(torch.zeros(1, shape[1], *(1,) * (len(shape) - 2)))
        add_reference(self, shape[0], shape[1:], labeled=num_classes > 0)
        self.double()
        samples = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
        if kind == "virtual":
            set_reference(self, samples, torch.arange(len(samples)) % num_classes if num_classes else None)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x + self.bias) if labels is None else self.layer(x + self.bias, labels)
        return out


def run(network: Shifted, *inputs: Tensor) -> Tensor:
    with reference_moments(network):
        out: Tensor = network(*inputs)
    return out


def random_input(shape: tuple[int, ...]) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 2


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_has_moments_of_a_sample_and_scales_of_channels(shape: tuple[int, ...]) -> None:
    layer = build_normalization("layer", 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    x = random_input(shape)
    out = layer(x)
    for sample, found in zip(x, out, strict=True):
        mean = sample.sum() / sample.numel()
        variance = ((sample - mean) ** 2).sum() / sample.numel()
        for channel in range(3):
            normal = (sample[channel] - mean) / torch.sqrt(variance + 1e-5)
            torch.testing.assert_close(found[channel], layer.weight[channel] * normal + layer.bias[channel])


def test_layer_norm_is_not_torchs() -> None:
    """Gulrajani et al.'s has a scale and an offset per channel, nn.LayerNorm([C, H, W]) one per element."""
    layer, torchs = build_normalization("layer", 3).double(), nn.LayerNorm([3, 4, 5]).double()
    assert [tuple(parameter.shape) for parameter in layer.parameters()] == [(3,), (3,)]
    assert torch.equal(layer.weight, torch.ones(3))
    assert torch.equal(layer.bias, torch.zeros(3))
    x = random_input(SHAPES[1])
    torch.testing.assert_close(layer(x), torchs(x))
    for module in (layer, torchs):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, torchs.weight.grad.sum((1, 2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_without_scale_and_offset(shape: tuple[int, ...]) -> None:
    x = random_input(shape)
    axes = (0, *range(2, x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    layer = BatchNorm(3, synchronized=True, affine=False)
    torch.testing.assert_close(layer(x), (x - mean) / torch.sqrt(variance + 1e-5))
    assert not list(layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_conditional_scale_and_offset_are_those_of_the_samples_class(kind: str, shape: tuple[int, ...]) -> None:
    x, labels = random_input(shape), torch.tensor([0, 1, 2, 2, 1, 0])
    network = Shifted(kind, shape, num_classes=3)
    layer = network.layer
    assert isinstance(layer, ConditionalNormalization)
    plain = run(network, x, labels)
    with torch.no_grad():
        layer.gain.weight.copy_(torch.arange(9.0).view(3, 3) - 3)
        layer.offset.weight.copy_(torch.arange(9.0).view(3, 3) / 7)
    out = run(network, x, labels)
    for sample, found, label in zip(plain, out, labels, strict=True):
        for channel in range(3):
            scale, offset = 3.0 * label + channel - 2, (3.0 * label + channel) / 7
            torch.testing.assert_close(found[channel], scale * sample[channel] + offset)


@pytest.mark.parametrize("kind", KINDS)
def test_conditional_normalization_starts_as_the_plain_one_of_scale_1(kind: str) -> None:
    """The eps of 2e-5 is of the code that it follows; on variances near 9 the other one is the same to 1e-6."""
    shape = SHAPES[1]
    x, labels = random_input(shape), torch.tensor([0, 1, 2, 2, 1, 0])
    plain = Shifted(kind, shape)
    for parameter in normalization_parameters(plain)[:1]:
        nn.init.ones_(parameter)
    conditional = run(Shifted(kind, shape, num_classes=3), x, labels)
    torch.testing.assert_close(conditional, run(plain, x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [0, 2])
def test_a_bias_is_without_effect_where_channels_are_centered(kind: str, num_classes: int) -> None:
    """Each network drops biases by this rule."""
    shape = SHAPES[1]
    x = random_input(shape)
    inputs = (x, torch.tensor([0, 1, 1, 0, 0, 1])) if num_classes else (x,)
    network = Shifted(kind, shape, num_classes)
    before = run(network, *inputs)
    with torch.no_grad():
        network.bias.copy_(torch.tensor([1.0, -3.0, 5.0]).view(1, 3, 1, 1))
    unchanged = torch.allclose(run(network, *inputs), before, rtol=1e-9, atol=1e-9)
    assert unchanged == centers_channels(kind)


def test_recomputed_statistics_of_conditional_batch_norm() -> None:
    """In evaluation mode each class's samples are normalized by the moments of all of them."""
    layer = build_normalization("synchronized", 3, num_classes=2).double()
    with torch.no_grad():
        layer.gain.weight.copy_(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
        layer.offset.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 2.0]]))
    x = torch.randn(4, 5, 3, 2, 2, dtype=torch.float64) * 2 + 1
    labels = torch.tensor([0, 1, 1, 0, 0])
    recompute_statistics(layer, [(batch, labels) for batch in x])
    samples = x.flatten(0, 1)
    mean, variance = samples.mean((0, 2, 3)), samples.var((0, 2, 3), correction=0)
    scale = ((1 + layer.gain.weight[labels]) / torch.sqrt(variance + 2e-5))[:, :, None, None]
    expected = scale * (x[0] - mean.view(1, 3, 1, 1)) + layer.offset.weight[labels][:, :, None, None]
    torch.testing.assert_close(layer.eval()(x[0], labels), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [0, 2])
def test_all_scales_and_offsets_are_found_once(kind: str, num_classes: int) -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), build_normalization(kind, 3, num_classes=num_classes))
    found = normalization_parameters(network)
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in network[1].parameters()}
    assert len(found) == (0 if kind == "none" and not num_classes else 2)
