"""Orthogonal regularization against its formula, and against the released code's gradient."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distgan.config import parse_config
from distgan.losses.orthogonality import OrthogonalRegularization, overlap
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.shape import SampleShape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.samples import MicroBatch
from tests.unit.test_reference_networks import FIXTURE, digest, name_of, networks


def term(network: nn.Module) -> Tensor:
    return OrthogonalRegularization()(SimpleNamespace(network=network))


def test_the_gradient_is_the_released_codes() -> None:
    generator, _ = networks("biggan-128")
    (1e-4 * term(generator)).backward()
    expected = json.loads(FIXTURE.read_text())["biggan-128"]["orthogonal"]
    found = {name_of(key): p.grad for key, p in generator.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert "shared_embedding.weight" not in found
    for key, values in expected.items():
        assert digest(key, found[key]) == pytest.approx(values, rel=1e-9, abs=1e-18), key


def test_the_value_by_hand() -> None:
    """Rows (1, 2), (3, 4), (0, 1) have the products 11, 2 and 4: 11^2 + 2^2 + 4^2, each pair counted once."""
    network = nn.Linear(2, 3)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]]))
        network.bias.fill_(7.0)
    assert term(network).item() == 11**2 + 2**2 + 4**2
    assert term(nn.Sequential(network, network)).item() == 11**2 + 2**2 + 4**2, "a weight counts once"
    assert term(nn.BatchNorm1d(3)).item() == 0


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (1, 5), (5, 1)])
def test_wide_and_tall_matrices_and_their_gradients(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    products = (matrix @ matrix.t()).detach() * (1 - torch.eye(shape[0], dtype=torch.float64))
    value = overlap(matrix)
    torch.testing.assert_close(value.detach(), products.square().sum())
    (gradient,) = torch.autograd.grad(value / 2, matrix)
    torch.testing.assert_close(gradient, 2 * products @ matrix.detach())


def test_orthogonal_rows_have_none_of_any_length() -> None:
    network = nn.Conv2d(2, 4, 2)
    nn.init.orthogonal_(network.weight, gain=3.0)
    assert term(network).item() == pytest.approx(0.0, abs=1e-9)


def test_weights_are_those_before_spectral_norm() -> None:
    network = nn.Sequential(nn.Linear(2, 3))
    before = term(network).item()
    add_spectral_norm(network)
    assert term(network).item() == pytest.approx(before)


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_recipe_adds_it_to_either_player(player: str) -> None:
    batch = MicroBatch(torch.arange(2), torch.randn(2, 4), None, torch.randn(2, 3, 32, 32), None)

    def evaluate(*terms: dict[str, object]) -> tuple[Tensor, dict[str, Tensor], nn.Module]:
        config = parse_config(
            {
                "run_dir": "x", "data": {"path": "x", "resolution": 32}, "training": {"steps": 1, "batch_size": 2},
                "generator": {"architecture": "biggan", "width": 2, "latent_size": 4},
                "discriminator": {"architecture": "biggan", "width": 2}, "objective": {"terms": terms},
            },
        )  # fmt: skip
        shape = SampleShape(resolution=32, channels=3)
        generator = build_generator(config.generator, shape)
        discriminator = build_discriminator(config.discriminator, shape)
        if player == "generator":
            return *GeneratorObjective(generator, discriminator, config, None)(batch, 0), generator
        return *DiscriminatorObjective(discriminator, generator, config, None)(batch, 0, 0), discriminator

    loss, parts, network = evaluate({"term": "orthogonal_regularization", "weight": 0.5, "player": player})
    plain, _, _ = evaluate()
    found = parts[f"loss/{player}.orthogonal_regularization"]
    torch.testing.assert_close(found, term(network).detach())
    assert found > 0
    torch.testing.assert_close(loss - plain, 0.5 * found)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
