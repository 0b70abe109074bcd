from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig, parse_config
from distgan.errors import UserError
from distgan.networks import build_discriminator
from distgan.networks.hooks import captured, find_layer
from distgan.networks.shape import SampleShape
from distgan.players.objective import GeneratorObjective


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
        self.rectifier = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.rectifier(self.blocks[0](x)))


def test_what_a_layer_gives_out_before_the_next_one_overwrites_it() -> None:
    network = Network().double()
    first, second = torch.randn(2, 5, 3, dtype=torch.float64)
    with captured(network, "blocks.0") as outputs:
        network(first)
        network.forward(second)
    assert len(outputs) == 2
    for found, inputs in zip(outputs, (first, second), strict=True):
        torch.testing.assert_close(found, inputs @ network.blocks[0].weight.T + network.blocks[0].bias)
        assert (found < 0).any(), "the rectifier works in place"


def test_gradients_flow_through_what_was_captured() -> None:
    network = Network().double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    with captured(network, "blocks.0") as outputs:
        network(x)
    (by_input,) = torch.autograd.grad(outputs[-1].square().sum(), x)
    torch.testing.assert_close(by_input, 2 * outputs[-1] @ network.blocks[0].weight)


def test_nothing_is_captured_afterwards() -> None:
    network = Network()
    with captured(network, "blocks.0") as outputs:
        network(torch.randn(1, 3))
    network(torch.randn(1, 3))
    with pytest.raises(ZeroDivisionError), captured(network, "blocks.1") as others:
        raise ZeroDivisionError
    network(torch.randn(1, 3))
    assert len(outputs) == 1
    assert not others


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"'block\.0'; .*\bblocks\.0, ") as caught:
        find_layer(Network(), "block.0")
    assert caught.value.everywhere
    with pytest.raises(UserError, match="no layer ''"):
        find_layer(Network(), "")


def test_a_layer_that_is_not_called() -> None:
    network = Network()
    with pytest.raises(UserError, match="'blocks' has no output"), captured(network, "blocks"):
        network(torch.randn(1, 3))


def test_what_makes_weights_is_no_layer() -> None:
    network = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    with pytest.raises(UserError, match="no layer"):
        find_layer(network, "parametrizations.weight.0")


def test_features_of_a_discriminator() -> None:
    discriminator = build_discriminator(DiscriminatorConfig(width=2), SampleShape(resolution=16, channels=1))
    with captured(discriminator, discriminator.feature_layer) as outputs:
        logits = discriminator(torch.randn(4, 1, 16, 16))
    (features,) = outputs
    assert features.shape == (4, 4, 4, 4)
    torch.testing.assert_close(discriminator.logit(features.flatten(1)).squeeze(1), logits)


def test_features_of_a_layer_that_is_not_there_name_the_key() -> None:
    values = {"run_dir": "r", "data": {"path": "d", "resolution": 16, "channels": 1},
              "training": {"steps": 1, "batch_size": 4}}  # fmt: skip
    for layer in ("nope", "layers.0.weight", "__class__"):
        config = parse_config(values, [f"objective.feature_matching.layer={layer}"])
        shape = SampleShape(resolution=16, channels=1)
        with pytest.raises(UserError, match=rf"^objective\.feature_matching\.layer: .*no layer {layer!r}"):
            GeneratorObjective(nn.Identity(), build_discriminator(config.discriminator, shape), config, None)
