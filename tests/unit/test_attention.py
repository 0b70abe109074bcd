"""Self-attention against its formula written out for one position at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distgan.networks.layers.attention import SelfAttention


def layer_of(channels: int) -> SelfAttention:
    layer = SelfAttention(channels).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def by_hand(layer: SelfAttention, sample: Tensor) -> Tensor:
    """Of one sample (C, H, W), in plain sums."""
    theta, phi, g, o = (getattr(layer, name).weight[:, :, 0, 0] for name in ("theta", "phi", "g", "o"))
    _, height, width = sample.shape
    places = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]

    def pooled(matrix: Tensor, row: int, column: int) -> Tensor:
        four = [matrix @ sample[:, row + down, column + right] for down in (0, 1) for right in (0, 1)]
        return torch.stack(four).amax(0)

    keys = [pooled(phi, *place) for place in places]
    values = [pooled(g, *place) for place in places]
    out = torch.empty_like(sample)
    for row in range(height):
        for column in range(width):
            query = theta @ sample[:, row, column]
            shares = torch.stack([torch.exp(query @ key) for key in keys])
            mean = sum(share * value for share, value in zip(shares / shares.sum(), values, strict=True))
            out[:, row, column] = sample[:, row, column] + layer.gamma[0] * (o @ mean)
    return out


def test_attention_is_its_formula() -> None:
    layer = layer_of(16)
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    assert [layer.theta.out_channels, layer.phi.out_channels, layer.g.out_channels] == [2, 2, 8]
    torch.testing.assert_close(layer(x), torch.stack([by_hand(layer, sample) for sample in x]))


def test_attention_starts_as_the_identity_and_learns_its_gamma_first() -> None:
    layer = SelfAttention(8)
    x = torch.randn(2, 8, 4, 4)
    out = layer(x)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert layer.gamma.grad.abs().item() > 0
    assert not layer.theta.weight.grad.any(), "as its output counts for nothing yet"


def test_attention_has_second_derivatives() -> None:
    layer = layer_of(8)
    x = torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_attention_in_bfloat16_keeps_the_dtype_of_its_input() -> None:
    layer = SelfAttention(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert layer(torch.randn(2, 8, 4, 4)).dtype == torch.float32
