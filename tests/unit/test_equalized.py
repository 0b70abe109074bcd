"""Equalized learning rate and pixel norm, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distgan.networks.layers.equalized import EqualizedConv2d, EqualizedLinear, PixelNorm, pixel_norm


def test_a_linear_layer_by_hand() -> None:
    layer = EqualizedLinear(8, 1)  # sqrt(2) / sqrt(8) = 1/2
    with torch.no_grad():
        layer.weight.copy_(torch.arange(8.0)[None])
        layer.bias.fill_(3.0)
    assert layer(torch.ones(1, 8)).item() == pytest.approx(28 / 2 + 3)
    assert EqualizedLinear(4, 1, gain=1.0).scale == 0.5


def test_a_convolution_by_hand() -> None:
    layer = EqualizedConv2d(2, 1, 3, padding=1, gain=math.sqrt(18))  # fan-in 2 * 9, so the scale is 1
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 10.0])[None, :, None, None].expand(1, 2, 3, 3))
        layer.bias.fill_(0.5)
    # Each output counts the neighbors inside the image: 4 at corners, 6 at edges, 9 inside.
    counts = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    torch.testing.assert_close(layer(torch.ones(1, 2, 3, 3))[0, 0], 11 * counts + 0.5)


def test_a_rate_multiplies_steps_and_nothing_else() -> None:
    """An SGD step of a layer with a rate r changes its output r^2 times as much; at first outputs are alike."""
    torch.manual_seed(0)
    slow = EqualizedLinear(6, 4, gain=1.0, rate=0.1, bias=2.0)
    usual = EqualizedLinear(6, 4, gain=1.0, bias=2.0)
    with torch.no_grad():
        usual.weight.copy_(slow.weight * 0.1)
    inputs = torch.ones(1, 6)
    before = usual(inputs).detach()
    torch.testing.assert_close(slow(inputs), before)
    for layer in (slow, usual):
        layer(inputs).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
    torch.testing.assert_close(slow(inputs) - before, 0.01 * (usual(inputs) - before), rtol=1e-4, atol=1e-6)


def test_a_strided_convolution_without_a_bias() -> None:
    layer = EqualizedConv2d(2, 3, 3, stride=2, gain=1.0, bias=False)
    images = torch.randn(1, 2, 7, 7)
    expected = torch.nn.functional.conv2d(images, layer.weight / 18**0.5, stride=2)
    torch.testing.assert_close(layer(images), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize("layer", [EqualizedConv2d(64, 32, 3), EqualizedLinear(500, 40)])
def test_weights_start_normal_and_biases_at_zero(layer: EqualizedConv2d | EqualizedLinear) -> None:
    assert layer.weight.mean().item() == pytest.approx(0.0, abs=0.03)
    assert layer.weight.std().item() == pytest.approx(1.0, rel=0.03)
    assert not layer.bias.any()


def test_the_gain_keeps_the_second_moment_through_a_rectifier() -> None:
    """He et al. 2015: after ReLU the mean square of the inputs is half their variance; sqrt(2) makes up for it."""
    torch.manual_seed(0)
    activations = torch.randn(4000, 300).relu()
    assert EqualizedLinear(300, 300)(activations).square().mean().item() == pytest.approx(1.0, rel=0.1)


def test_every_layer_learns_equally_fast() -> None:
    """An Adam step of the same rate changes a wide and a narrow layer's output by the same share."""
    shares = []
    for inputs in (16, 4096):
        torch.manual_seed(0)
        layer = EqualizedLinear(inputs, 256)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, betas=(0.0, 0.99))
        before = (layer.weight * layer.scale).detach().clone()
        layer(torch.randn(8, inputs)).square().mean().backward()
        optimizer.step()
        shares.append(((layer.weight * layer.scale).detach() - before).norm() / before.norm())
    assert shares[0].item() == pytest.approx(0.01, rel=0.05)
    assert shares[1].item() == pytest.approx(0.01, rel=0.05)


def test_pixel_norm_by_hand() -> None:
    pixels = torch.tensor([[[[3.0, 1.0]], [[4.0, -7.0]]]], dtype=torch.float64)  # (3, 4) and (1, -7)
    # Mean squares 12.5 and 25.
    expected = torch.tensor([[[[3 / 12.5**0.5, 0.2]], [[4 / 12.5**0.5, -1.4]]]], dtype=torch.float64)
    torch.testing.assert_close(pixel_norm(pixels), expected, rtol=1e-8, atol=0)


def test_pixel_norm_is_over_channels_alone() -> None:
    activations = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    found = PixelNorm()(activations).numpy()
    lengths = np.sqrt((activations.numpy() ** 2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, np.sqrt(5) * activations.numpy() / lengths, rtol=1e-6)
    latents = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(pixel_norm(latents), pixel_norm(latents[:, :, None, None])[:, :, 0, 0])


def test_pixel_norm_of_nothing_is_nothing() -> None:
    activations = torch.zeros(1, 4, 2, 2, requires_grad=True)
    pixel_norm(activations).sum().backward()
    assert activations.grad is not None
    assert activations.grad.isfinite().all()
    assert not pixel_norm(activations).any()


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(EqualizedConv2d(2, 3, 3, padding=1), torch.nn.LeakyReLU(0.2), PixelNorm()).double()
    inputs = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, inputs)
