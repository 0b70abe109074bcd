"""Spectral norm against the singular values that LAPACK finds, and torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distgan.networks.layers.spectral_norm import SpectralNorm, add_spectral_norm, power_iteration_vectors

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "transposed convolution": lambda: nn.ConvTranspose2d(3, 5, 4),
    "embedding": lambda: nn.Embedding(6, 4),
}


def matrix_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """(outputs, everything else): a transposed convolution has its outputs second."""
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_sigma_is_the_largest_singular_value(kind: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[kind]().double()
    weight = layer.weight.detach().clone()
    add_spectral_norm(layer)
    for _ in range(300):
        normalized = layer.weight
    torch.testing.assert_close(normalized, weight / torch.linalg.svdvals(matrix_of(layer, weight))[0])
    torch.testing.assert_close(
        torch.linalg.svdvals(matrix_of(layer, normalized))[0], torch.ones((), dtype=torch.float64)
    )


def test_a_training_forward_is_one_step_of_algorithm_1() -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    add_spectral_norm(layer)
    u, _ = (vector.clone() for vector in power_iteration_vectors(layer))
    weight = layer.parametrizations.weight.original
    matrix = weight.flatten(1).detach()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    for _ in range(3):
        out = layer(x)
        v = matrix.T @ u / (matrix.T @ u).norm()
        u = matrix @ v / (matrix @ v).norm()
        torch.testing.assert_close(power_iteration_vectors(layer), [u, v])
        torch.testing.assert_close(out, nn.functional.conv2d(x, weight / (u @ matrix @ v), layer.bias))


def test_vectors_are_constants_in_both_derivatives() -> None:
    """By hand: d(W/s) with s = u^T W v; and the second derivative of a loss on a gradient, by finite differences."""
    layer = nn.Linear(4, 3, bias=False).double()
    add_spectral_norm(layer)
    weight = layer.parametrizations.weight.original
    norm = layer.parametrizations.weight[0]
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((layer(x) * upstream).sum(), weight)
    u, v = norm.u, norm.v
    sigma = u @ weight @ v
    by_normalized = upstream.T @ x
    by_hand = by_normalized / sigma - (by_normalized * weight).sum() / sigma**2 * torch.outer(u, v)
    torch.testing.assert_close(gradient, by_hand)
    layer.eval()  # holds u and v, as the derivative does

    def penalty(original: Tensor) -> Tensor:
        out = x @ norm(original).T
        (by_input,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return by_input.square().sum()

    assert torch.autograd.gradcheck(penalty, weight)


def test_agrees_with_torchs_own_once_converged() -> None:
    ours = nn.Linear(6, 6).double()
    theirs = copy.deepcopy(ours)
    add_spectral_norm(ours)
    nn.utils.parametrizations.spectral_norm(theirs)
    x = torch.randn(3, 6, dtype=torch.float64)
    for _ in range(500):
        ours(x), theirs(x)
    torch.testing.assert_close(ours(x), theirs(x))
    for network in (ours, theirs):
        network(x).square().sum().backward()
    torch.testing.assert_close(ours.parametrizations.weight.original.grad, theirs.parametrizations.weight.original.grad)


def test_two_forwards_before_the_backward() -> None:
    """As in D(real) - D(fake): the second one's step leaves the first one's graph alone."""
    layer = nn.Linear(4, 3).double()
    add_spectral_norm(layer)
    x = torch.randn(2, 4, dtype=torch.float64)
    (layer(x).square().sum() - layer(2 * x).square().sum()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_evaluation_mode_moves_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    add_spectral_norm(network)
    vectors = power_iteration_vectors(network)
    before = [vector.clone() for vector in vectors]
    x = torch.randn(1, 2, 8, 8)
    network.eval()
    first, second = network(x), network(x)
    assert torch.equal(first, second)
    assert all(map(torch.equal, vectors, before))
    network.train()
    network(x)
    assert not any(map(torch.equal, vectors, before))


def test_restored_vectors_undo_a_forward() -> None:
    """What a skipped update relies on: these vectors are all that a training forward changes."""
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    add_spectral_norm(network)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    saved = [vector.clone() for vector in power_iteration_vectors(network)]
    x = torch.randn(3, 5)
    out = network(x)
    for vector, before in zip(power_iteration_vectors(network), saved, strict=True):
        vector.copy_(before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(x), out)


def test_copies_and_state_dicts_go_on_alike() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3))
    add_spectral_norm(network)
    copied = copy.deepcopy(network)
    loaded = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3))
    add_spectral_norm(loaded)
    loaded.load_state_dict(network.state_dict())
    x = torch.randn(1, 2, 6, 6)
    for _ in range(3):
        expected = network(x)
        assert torch.equal(copied(x), expected)
        assert torch.equal(loaded(x), expected)


def test_memory_format_does_not_matter() -> None:
    layer = nn.Conv2d(4, 5, 3).double()
    add_spectral_norm(layer)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_sigma_is_float32_under_autocast() -> None:
    layer = nn.Linear(64, 64)
    add_spectral_norm(layer)
    other = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.weight
    assert torch.equal(under_autocast, other.weight)
    assert under_autocast.dtype == torch.float32


def test_can_be_built_on_the_meta_device() -> None:
    """As exports are, whose tensors come from a file."""
    with torch.device("meta"):
        layer = nn.Linear(4, 3)
        add_spectral_norm(layer)
    source = nn.Linear(4, 3)
    add_spectral_norm(source)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 4)
    assert torch.equal(layer.eval()(x), source.eval()(x))


def test_only_weights_of_layers_are_divided() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.GroupNorm(1, 3))
    add_spectral_norm(network)
    assert sum(isinstance(module, SpectralNorm) for module in network.modules()) == 1
