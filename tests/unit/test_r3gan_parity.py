"""Ten steps of R3GAN's training against a loop written by hand from the paper's equations, in float64.

Weights, real samples, labels, latents and draws of the augmentation are given from outside. The loop below has its own
networks and losses (Huang et al. 2024, sections 4 and 2), Adam (Kingma and Ba 2015, algorithm 1), curves, average and
resampling. All curves move, and end within the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan import randomness
from distgan.config import Config, parse_config
from distgan.distributed.runtime import Runtime
from distgan.losses.augmentation import AugmentationDraws
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import sample_shape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.player import Player
from distgan.players.samples import MicroBatch
from distgan.schedule import Update
from distgan.training.ema import EMAGenerator, Profiles
from distgan.training.loop import train_step
from distgan.training.state import Progress, TrainingState
from tools.bench.augmentation import released_operators

STEPS, BATCH, CLASSES, LATENT, GROUP = 10, 4, 3, 5, 8
OVER = 32
"""Images over which the curves move, of the run's 40."""
RATE, BETA2, GAMMA, HALF_LIFE, PROBABILITY = (2e-4, 5e-5), (0.9, 0.99), (0.5, 0.05), (0.0, 30.0), (0.0, 0.55)
Weights = dict[str, Tensor]


def config_of(*, augmented: bool) -> Config:
    def curve(ends: tuple[float, float], unit: float = 1.0) -> dict[str, Any]:
        return {"start": ends[0] / unit, "end": ends[1] / unit, "over": OVER / 1000, "shape": "cosine"}

    network = {
        "architecture": "r3gan", "width": 8, "max_width": 16, "depth": 2, "group_width": GROUP,
        "optimizer": {"learning_rate": curve(RATE), "betas": [0, curve(BETA2)], "eps": 1e-8},
    }  # fmt: skip
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": 16, "labels": True},
            "generator": {**network, "latent_size": LATENT},
            "discriminator": network,
            "objective": {
                "adversarial": "relativistic_paired",
                "r1": {"gamma": curve(GAMMA)},
                "r2": {"gamma": curve(GAMMA)},
                "augmentation": {"augmentation": "ada", "probability": curve(PROBABILITY)} if augmented else None,
            },
            "ema": {"half_life_kimg": curve(HALF_LIFE, 1000.0)},
            "training": {"steps": STEPS, "batch_size": BATCH},
        }
    )


class Given:
    """Batches of both players, each with reals, labels and latents of its own."""

    def __init__(self) -> None:
        fixed = torch.Generator().manual_seed(1)

        def draw() -> MicroBatch:
            reals = torch.randn(BATCH, 3, 16, 16, generator=fixed, dtype=torch.float64)
            latents = torch.randn(BATCH, LATENT, generator=fixed, dtype=torch.float64)
            labels = torch.randint(CLASSES, (BATCH,), generator=fixed)
            return MicroBatch(torch.arange(BATCH), latents, None, reals, labels)

        self.batches = [(draw(), draw()) for _ in range(STEPS)]

    def discriminator_inputs(self, update: Update) -> Iterator[MicroBatch]:
        yield self.batches[update.index][0]

    def generator_inputs(self, step: int) -> Iterator[MicroBatch]:
        yield self.batches[step][1]


@pytest.mark.parametrize("augmented", [False, True])
def test_ten_steps_are_those_of_the_papers_equations(augmented: bool) -> None:
    """R1 and R2 are at samples before their augmentation."""
    if augmented and not has_second_derivative():
        pytest.skip("the loop by hand needs torch's second derivative of grid_sample")
    config, given, runtime = config_of(augmented=augmented), Given(), Runtime()
    shape = sample_shape(config.data, num_classes=CLASSES)
    generator, discriminator = (
        build_generator(config.generator, shape),
        build_discriminator(config.discriminator, shape),
    )
    fixed = torch.Generator().manual_seed(2)
    for network in (generator.double(), discriminator.double()):
        for parameter in network.parameters():
            if not parameter.any():  # biases, and last convolutions of blocks
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=fixed, dtype=torch.float64))
    expected = reference(weights_of(generator), weights_of(discriminator), given, augmented=augmented)

    average = EMAGenerator(generator)
    players = (
        Player(GeneratorObjective(generator, discriminator, config, None), config.generator.optimizer, runtime),
        Player(DiscriminatorObjective(discriminator, generator, config, None), config.discriminator.optimizer, runtime),
    )
    index: Any = None
    state = TrainingState(config, index, *players, average, Profiles(generator, ()), Progress(), None)
    before = weights_of(generator)
    for _ in range(STEPS):
        feed: Any = given
        train_step(state, feed, runtime)
    assert state.progress.used == (2 * STEPS * BATCH, STEPS * BATCH)
    for network, wanted in zip((generator, discriminator, average.network), expected, strict=True):
        found = weights_of(network)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    moved = [(expected[0][name] - value).abs().max().item() for name, value in before.items()]
    assert min(moved) > 1e-4, "all tensors have moved"


def weights_of(network: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def has_second_derivative() -> bool:
    image, grid = torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 1, 2)
    sampled = F.grid_sample(image, grid, align_corners=False).square()
    (slope,) = torch.autograd.grad(sampled.sum(), image, create_graph=True)
    try:
        torch.autograd.grad(slope.sum(), image)
    except RuntimeError:
        return False
    return True


def augment(samples: Tensor, role: str, kind: str, images: int) -> Tensor:
    """ADA by the operators of its released code, with this run's draws."""

    def draws_of(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda name, *shape: draw(
            0, f"{role}/augmentation of {kind}/{name}", torch.arange(BATCH), shape
        ).double()

    probability = cosine(*PROBABILITY, images)
    draws = AugmentationDraws(draws_of(randomness.uniform), draws_of(randomness.normal), probability)
    return released_operators(samples, draws)


def reference(
    generator: Weights, discriminator: Weights, given: Given, *, augmented: bool
) -> tuple[Weights, Weights, Weights]:
    """Return the weights of both players and of the average."""
    seen = augment if augmented else lambda samples, *_: samples
    average = dict(generator)
    squares = [
        {name: torch.zeros_like(value) for name, value in player.items()} for player in (generator, discriminator)
    ]
    for step, (critics, own) in enumerate(given.batches):
        images = step * BATCH
        rate, beta, gamma = (cosine(*ends, images) for ends in (RATE, BETA2, GAMMA))

        # max over D: E f(-(D(G(z)) - D(x))) - gamma/2 (E|grad D(x)|^2 + E|grad D(G(z))|^2), with f(t) = -log(1 + e^-t)
        assert critics.reals is not None
        assert critics.real_labels is not None
        trained = {name: value.clone().requires_grad_() for name, value in discriminator.items()}
        real = critics.reals.clone().requires_grad_()
        fake = generate(generator, critics.latents, critics.real_labels).requires_grad_()
        real_logits, fake_logits = (
            judge(trained, seen(side, "discriminator", kind, images), critics.real_labels)
            for side, kind in ((real, "real"), (fake, "fake"))
        )
        loss = F.softplus(-(real_logits - fake_logits)).mean()
        for side, logits in ((real, real_logits), (fake, fake_logits)):
            (slope,) = torch.autograd.grad(logits.sum(), side, create_graph=True)
            loss = loss + gamma / 2 * slope.square().sum((1, 2, 3)).mean()
        discriminator = adam(trained, loss, squares[1], rate, beta, step + 1)

        # min over G of the paired loss with the sides exchanged, at reals of its own
        assert own.reals is not None
        assert own.real_labels is not None
        trained = {name: value.clone().requires_grad_() for name, value in generator.items()}
        fake = seen(generate(trained, own.latents, own.real_labels), "generator", "fake", images)
        fake_logits = judge(discriminator, fake, own.real_labels)
        real_logits = judge(discriminator, seen(own.reals, "generator", "real", images), own.real_labels)
        loss = F.softplus(-(fake_logits - real_logits)).mean()
        generator = adam(trained, loss, squares[0], rate, beta, step + 1)

        kept = 0.5 ** (BATCH / max(cosine(*HALF_LIFE, images), 1e-8))
        average = {name: kept * average[name] + (1 - kept) * value for name, value in generator.items()}
    return generator, discriminator, average


def cosine(start: float, end: float, images: int) -> float:
    """v(n) = end + (start - end)(1 + cos(pi n/N))/2, and end from N on."""
    return end if images > OVER else end + (start - end) * (1 + math.cos(math.pi * images / OVER)) / 2


def adam(weights: Weights, loss: Tensor, squares: Weights, rate: float, beta: float, count: int) -> Weights:
    """Adam with beta1 = 0; the bias is corrected by today's beta2."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for (name, _), gradient in zip(weights.items(), gradients, strict=True):
        squares[name] = beta * squares[name] + (1 - beta) * gradient**2
    return {
        name: value.detach() - rate * gradient / ((squares[name] / (1 - beta**count)).sqrt() + 1e-8)
        for (name, value), gradient in zip(weights.items(), gradients, strict=True)
    }


def generate(weights: Weights, latents: Tensor, labels: Tensor) -> Tensor:
    """4x4 images scaled by a linear map of (z, vector of the label), then stages of two blocks, to 16x16."""
    vectors = torch.cat((latents, weights["embedding.weight"][labels]), 1)
    scales = vectors @ weights["stages.0.0.scale.weight"].T
    found = weights["stages.0.0.images"] * scales[:, :, None, None]
    found = blocks(weights, "stages.0", found, first=1)
    found = blocks(weights, "stages.1", up(found), first=1)  # 16 channels at 4x4 and 8x8
    found = up(pointwise(found, weights["stages.2.0.weight"]))  # 8 at 16x16
    found = blocks(weights, "stages.2", found, first=2)
    return pointwise(found, weights["to_image.weight"])


def judge(weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
    found = blocks(weights, "stages.0", pointwise(images, weights["stages.0.0.weight"]), first=1)
    found = pointwise(down(found), weights["stages.0.4.weight"])
    found = down(blocks(weights, "stages.1", found, first=0))
    found = blocks(weights, "stages.2", found, first=0)
    features = (found * weights["features.0.weight"][:, 0]).sum((2, 3))
    return ((features @ weights["logit.0.weight"].T) * weights["embedding.weight"][labels]).sum(1)


def blocks(weights: Weights, stage: str, x: Tensor, first: int) -> Tensor:
    """x + W3 a(W2 a(W1 x)), twice; W2 is 3x3 in groups, and a is LeakyReLU(0.2) after a bias."""
    for number in (first, first + 1):
        layers = [weights[f"{stage}.{number}.layers.{layer}"] for layer in
                  ("0.weight", "1.bias", "2.weight", "3.bias", "4.weight")]  # fmt: skip
        inner = F.leaky_relu(pointwise(x, layers[0]) + layers[1][:, None, None], 0.2)
        inner = F.conv2d(inner, layers[2], padding=1, groups=inner.shape[1] // GROUP)
        x = x + pointwise(F.leaky_relu(inner + layers[3][:, None, None], 0.2), layers[4])
    return x


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, weight[:, :, 0, 0])


def up(x: Tensor) -> Tensor:
    """Along each axis, pixels 2i and 2i + 1 are (x[i-1] + 3 x[i])/4 and (3 x[i] + x[i+1])/4, with zeros outside."""
    for axis in (2, 3):
        before, after = beside(x, axis)
        x = torch.stack(((before + 3 * x) / 4, (3 * x + after) / 4), axis + 1).flatten(axis, axis + 1)
    return x


def down(x: Tensor) -> Tensor:
    """Along each axis, pixel i is (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2])/8, with zeros outside."""
    for axis in (2, 3):
        even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
        x = (beside(odd, axis)[0] + 3 * even + 3 * odd + beside(even, axis)[1]) / 8
    return x


def beside(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """x[i-1] and x[i+1]."""
    zero, count = torch.zeros_like(x.narrow(axis, 0, 1)), x.shape[axis]
    return (
        torch.cat((zero, x.narrow(axis, 0, count - 1)), axis),
        torch.cat((x.narrow(axis, 1, count - 1), zero), axis),
    )
