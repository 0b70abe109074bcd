"""Layers that compare the samples of a batch, against loops over pairs and groups as the papers write them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distgan.networks.layers.minibatch import MinibatchDiscrimination, MinibatchStddev


def naive_discrimination(features: Tensor, weight: Tensor, kernels: int) -> Tensor:
    """Salimans et al. 2016, section 3.2, less the term j = i."""
    matrices = [weight.view(kernels, -1, features.shape[1]) @ sample for sample in features]
    rows = []
    for i, mine in enumerate(matrices):
        sums = []
        for b in range(kernels):
            total = features.new_zeros(())
            for j, other in enumerate(matrices):
                if j != i:
                    total = total + torch.exp(-sum(abs(mine[b, c] - other[b, c]) for c in range(mine.shape[1])))
            sums.append(total)
        rows.append(torch.stack(sums))
    return torch.cat((features, torch.stack(rows)), dim=1)


def naive_stddev(activations: Tensor, group_size: int) -> Tensor:
    """Karras et al. 2018, section 3: one number a group, of which every (N / G)-th sample is a member."""
    total = len(activations)
    groups = total // min(group_size, total)
    planes = []
    for place in range(total):
        members = [activations[other] for other in range(total) if other % groups == place % groups]
        mean = sum(members) / len(members)
        variance = sum((member - mean) ** 2 for member in members) / len(members)
        planes.append(torch.sqrt(variance + 1e-8).mean().expand(1, *activations.shape[2:]))
    return torch.cat((activations, torch.stack(planes)), dim=1)


def test_discrimination_against_a_loop_over_pairs() -> None:
    layer = MinibatchDiscrimination(4, kernels=3, dimensions=2).double()
    features = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    inputs = (features, layer.projection.weight)
    expected = naive_discrimination(*inputs, 3)
    torch.testing.assert_close(layer(features), expected)
    upstream = torch.randn_like(expected)
    found_first = torch.autograd.grad((layer(features) * upstream).sum(), inputs, create_graph=True)
    first = torch.autograd.grad((expected * upstream).sum(), inputs, create_graph=True)
    torch.testing.assert_close(found_first, first)
    found_second = torch.autograd.grad(sum(g.square().sum() for g in found_first), inputs)
    torch.testing.assert_close(found_second, torch.autograd.grad(sum(g.square().sum() for g in first), inputs))


def test_equal_samples_are_counted() -> None:
    """All n samples alike: exp(0) for each of the n - 1 others. All far apart: nothing."""
    layer = MinibatchDiscrimination(3, kernels=2, dimensions=4)
    alike = torch.ones(6, 3)
    assert torch.equal(layer(alike)[:, 3:], torch.full((6, 2), 5.0))
    apart = 1e4 * torch.arange(6.0)[:, None].expand(6, 3)
    assert torch.equal(layer(apart)[:, 3:], torch.zeros(6, 2))
    assert torch.equal(layer(alike[:1])[:, 3:], torch.zeros(1, 2)), "alone, a sample has no others"


@pytest.mark.parametrize("features", [512, 8192])
def test_similarities_start_neither_at_0_nor_at_all(features: int) -> None:
    """For many independent features of unit variance, a distance is a sum of C absolute values from N(0, 2), and
    E exp(-|d|) of one of them is e erfc(1)."""
    torch.manual_seed(3)
    layer = MinibatchDiscrimination(features, kernels=50, dimensions=5)
    mean = layer(torch.randn(64, features))[:, features:].mean().item() / 63
    assert mean == pytest.approx((math.e * math.erfc(1.0)) ** 5, rel=0.1)


@pytest.mark.parametrize("group_size", [1, 2, 3, 6, 16])
def test_stddev_against_a_loop_over_groups(group_size: int) -> None:
    layer = MinibatchStddev(group_size)
    activations = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = naive_stddev(activations, group_size)
    torch.testing.assert_close(layer(activations), expected)
    upstream = torch.randn_like(expected)
    (found_first,) = torch.autograd.grad((layer(activations) * upstream).sum(), activations, create_graph=True)
    (first,) = torch.autograd.grad((expected * upstream).sum(), activations, create_graph=True)
    torch.testing.assert_close(found_first, first)
    (found_second,) = torch.autograd.grad(found_first.square().sum(), activations)
    (second,) = torch.autograd.grad(first.square().sum(), activations)
    torch.testing.assert_close(found_second, second)


def test_stddev_is_in_float32_on_bfloat16_activations() -> None:
    activations = 100 + torch.randn(8, 4, 2, 2).bfloat16()
    out = MinibatchStddev(8)(activations)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, naive_stddev(activations.double(), 8).bfloat16())
