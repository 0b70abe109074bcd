"""Virtual batch norm against the formulas of Salimans et al. 2016, sample by sample."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distgan.config import GeneratorConfig
from distgan.networks import build_generator
from distgan.networks.layers.virtual_batch_norm import VirtualBatchNorm, add_reference, reference_moments, set_reference
from distgan.networks.shape import SampleShape


class Network(nn.Module):
    """One layer, so that what it normalizes is what goes in."""

    def __init__(self, sizes: tuple[int, ...], count: int) -> None:
        super().__init__()
        self.layer = VirtualBatchNorm(sizes[0]).double()
        add_reference(self, count, sizes, labeled=False)
        self.double()

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(samples)
        return out


@pytest.mark.parametrize("sizes", [(3,), (3, 4, 4)])
def test_one_sample_against_the_papers_mixture_of_raw_moments(sizes: tuple[int, ...]) -> None:
    count = 5
    network = Network(sizes, count)
    reference = torch.randn(count, *sizes, dtype=torch.float64) * 2 + 1
    set_reference(network, reference, None)
    samples = torch.randn(2, *sizes, dtype=torch.float64) - 3
    with reference_moments(network):
        out = network(samples)
    c = 1 / (count + 1)
    for sample, found in zip(samples, out, strict=True):
        for channel in range(3):
            own, others = sample[channel], reference[:, channel]
            mean = c * own.mean() + (1 - c) * others.mean()
            square = c * own.square().mean() + (1 - c) * others.square().mean()
            normal = (own - mean) / torch.sqrt(1e-5 + square - mean**2)
            expected = network.layer.weight[channel] * normal + network.layer.bias[channel]
            torch.testing.assert_close(found[channel], expected)


def test_the_reference_is_normalized_by_itself_alone() -> None:
    """In a network of two layers, the second one's reference moments are of the first one's plain batch norm."""
    network = Network((2, 3, 3), 4)
    network.second = VirtualBatchNorm(2).double()
    network.forward = lambda samples, labels=None: network.second(network.layer(samples).relu())  # type: ignore[assignment, method-assign]
    reference = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    set_reference(network, reference, None)
    with reference_moments(network):
        out = network.forward(reference)
    first = nn.functional.batch_norm(
        reference, None, None, network.layer.weight, network.layer.bias, training=True
    ).relu()
    alone = Network((2, 3, 3), 4)
    alone.layer = network.second
    set_reference(alone, first.detach(), None)
    with reference_moments(network), reference_moments(alone):
        expected = alone(network.layer(reference).relu())
    torch.testing.assert_close(out, expected)


def test_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    generator = vbn_generator().double()
    latents = torch.rand(6, 8, dtype=torch.float64)
    with reference_moments(generator):
        together = generator(latents)
        alone = torch.cat([generator(latents[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_gradients_flow_through_the_reference_batch() -> None:
    network = Network((2,), 3)
    network.first = nn.Linear(2, 2).double()
    network.forward = lambda samples, labels=None: network.layer(network.first(samples))  # type: ignore[assignment, method-assign]
    set_reference(network, torch.randn(3, 2), None)
    samples = torch.randn(1, 2, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        network.first.weight = nn.Parameter(weight)
        with reference_moments(network):
            return network.forward(samples).square().sum()

    weight = torch.randn(2, 2, dtype=torch.float64)
    loss_value = loss(weight)
    (gradient,) = torch.autograd.grad(loss_value, network.first.weight)
    step = 1e-6
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        shifted = [weight.clone(), weight.clone()]
        shifted[0][place] += step
        shifted[1][place] -= step
        numeric = (loss(shifted[0]) - loss(shifted[1])) / (2 * step)
        assert gradient[place].item() == pytest.approx(numeric.item(), rel=1e-5)


def vbn_generator() -> nn.Module:
    config = GeneratorConfig(normalization="virtual", reference_size=5, width=2, latent_size=8)
    generator = build_generator(config, SampleShape(resolution=16, channels=1))
    set_reference(generator, torch.rand(5, 8), None)
    return generator


def test_the_reference_batch_is_part_of_the_state_and_its_moments_are_not() -> None:
    generator = vbn_generator()
    assert torch.equal(generator.state_dict()["reference"], generator.get_buffer("reference"))
    latents = torch.rand(2, 8)
    with reference_moments(generator), torch.no_grad():
        images = generator(latents)
        average = copy.deepcopy(generator)
        with reference_moments(average):
            assert torch.equal(average(latents), images)
    with pytest.raises(AssertionError, match="reference_moments"):
        generator(latents)


def test_nested_blocks_share_the_moments() -> None:
    network = Network((2,), 3)
    set_reference(network, torch.randn(3, 2), None)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    network.layer.register_forward_hook(count)
    with reference_moments(network), reference_moments(network):
        network(torch.randn(2, 2).double())
    assert passes == 2
