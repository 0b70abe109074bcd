"""Path-length regularization and lazy terms, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distgan.config import load_config, parse_config
from distgan.errors import UserError
from distgan.losses.path_length import PathLength
from distgan.networks import build_discriminator, build_generator
from distgan.networks.moving import moving_buffers
from distgan.networks.shape import SampleShape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.samples import MicroBatch
from distgan.players.terms import TermView
from distgan.training.loop import train
from tests.runs import recipe

HERE = __name__
SHAPE = SampleShape(resolution=8, channels=1)


class Linear(nn.Module):
    """An outsider's generator, whose images are a linear function of the sum of two layers' styles."""

    moving_buffers = ("path_length",)

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.arange(8.0).view(4, 2))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("path_length", torch.tensor(10.0))
        self.path_length: Tensor

    def styles(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return (self.scale * latents)[:, None].expand(-1, 2, -1)

    def synthesize(self, styles: Tensor, latents: Tensor) -> Tensor:
        return (styles.sum(1) @ self.matrix.t()).view(-1, 1, 2, 2)


class View(NamedTuple):
    network: nn.Module
    latents: Tensor
    noise: Tensor
    labels: Tensor | None = None

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self.noise.view(-1, *shape)


def test_lengths_of_a_linear_generator() -> None:
    """The gradient by each layer's style is A^T y / 2 of an image of 4 pixels; the mean over layers of its square."""
    network = Linear()
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    loss = PathLength(decay=0.25, shrink=2)(View(network, torch.randn(6, 2), noise))
    lengths = torch.stack([(network.matrix.t() @ y / 2).norm() for y in noise[::2]])
    mean = 0.75 * 10 + 0.25 * lengths.mean()
    torch.testing.assert_close(loss, (lengths - mean).square().mean())
    torch.testing.assert_close(network.path_length, mean.detach())
    (expected,) = torch.autograd.grad((lengths - mean).square().mean(), network.matrix)
    loss.backward()
    torch.testing.assert_close(network.matrix.grad, expected)
    assert moving_buffers(network) == [network.path_length]


@pytest.mark.parametrize(
    ("network", "samples", "parts"),
    [(Linear(), 3, ["shrink = 2", "3 samples"]), (nn.Linear(2, 2), 4, ["Linear has no styles", "stylegan2"])],
)
def test_what_does_not_fit_is_refused(network: nn.Module, samples: int, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        PathLength()(View(network, torch.randn(samples, 2), torch.randn(samples, 4)))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


class Logits:
    """A term that depends on the weights, and says that it was asked."""

    asked = 0
    networks: list[nn.Module]

    def __call__(self, view: TermView) -> Tensor:
        Logits.asked += 1
        Logits.networks = [*getattr(Logits, "networks", []), view.network]
        return view.fake_logits.square().mean()


def objectives(every: int, player: str) -> tuple[GeneratorObjective, DiscriminatorObjective]:
    network: dict[str, Any] = {"architecture": "r3gan", "normalization": "none", "width": 8, "max_width": 8}
    config = parse_config(
        {
            "run_dir": "r",
            "data": {"path": "d", "resolution": 8, "channels": 1},
            "training": {"steps": 1, "batch_size": 4},
            "generator": {**network, "latent_size": 3},
            "discriminator": network,
            "objective": {"terms": [{"term": f"{HERE}:Logits", "weight": 3, "every": every, "player": player}]},
        },
        trust=True,
    )
    generator = build_generator(config.generator, SHAPE)
    discriminator = build_discriminator(config.discriminator, SHAPE)
    return (
        GeneratorObjective(generator, discriminator, config, None),
        DiscriminatorObjective(discriminator, generator, config, None),
    )


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_lazy_term_is_as_strong_on_average(player: str) -> None:
    """Over 16 updates of one batch, the gradient is the same for an interval of 1 and of 16, from 16 and 1 calls."""
    generator = torch.Generator().manual_seed(0)
    reals = torch.rand(4, 1, 8, 8, generator=generator)
    batch = MicroBatch(torch.arange(4), torch.randn(4, 3, generator=generator), None, reals, None)
    totals = []
    for every, calls in ((1, 16), (16, 1)):
        Logits.asked, Logits.networks = 0, []
        found = objectives(every, player)
        objective = found[player == "discriminator"]
        weights = list(objective.network.parameters())
        total = [torch.zeros_like(weight) for weight in weights]
        for update in range(16):
            loss, parts = objective(batch, *(0, update))
            assert (f"loss/{player}.Logits" in parts) == (update % every == 0)
            for add, gradient in zip(total, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                add += 0 if gradient is None else gradient
        assert Logits.asked == calls
        assert all(network is objective.network for network in Logits.networks)
        totals.append(torch.cat([part.flatten() for part in total]))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-4, atol=1e-5)
    assert totals[0].abs().max() > 1e-3


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_run_computes_a_lazy_term_in_every_second_update(tmp_path: Path, digits: Path, player: str) -> None:
    """Of 5 updates of the generator and 10 of the discriminator, from the first on."""
    terms = [{"term": f"{HERE}:Logits", "every": 2, "player": player}]
    Logits.asked = 0
    train(load_config(recipe(tmp_path, digits, objective={"terms": terms}, training={"steps": 5})))
    assert Logits.asked == {"generator": 3, "discriminator": 5}[player]


def test_a_built_in_term_is_named_in_a_recipe() -> None:
    term = parse_config(
        {
            "run_dir": "r",
            "data": {"path": "d", "resolution": 8},
            "training": {"steps": 1, "batch_size": 4},
            "objective": {"terms": [{"term": "path_length", "weight": 2, "every": 4, "decay": 0.1}]},
        }
    ).objective.terms[0]
    assert isinstance(term.build(), PathLength)
    assert (term.weight, term.every, term.options.decay, term.options.shrink) == (2, 4, 0.1, 2)
