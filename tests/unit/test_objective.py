"""Both players' whole objectives against the papers' algorithms, with linear networks whose gradients are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distgan import randomness
from distgan.config import Config, DiscriminatorConfig, parse_config
from distgan.config.objective import LOSSES
from distgan.networks import build_discriminator
from distgan.networks.layers.virtual_batch_norm import VirtualBatchNorm
from distgan.networks.shape import SampleShape
from distgan.players import scalars
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.samples import MicroBatch

SEED, STEPS, COUNT = 3, 10, 6
W = np.array([0.3, -1.1])
A = np.array([[0.5, 1.0], [-2.0, 0.25]])


class Linear(nn.Module):
    """A generator x = A z."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(A.copy()))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents @ self.weight.T


class Bowl(nn.Module):
    """A discriminator D(x) = w . x + |x|^2 / 2, whose gradient in x is w + x; its features are x w, element by
    element."""

    feature_layer = "features"

    def __init__(self) -> None:
        super().__init__()
        self.features = Scaled()

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.features(samples).sum(1) + samples.square().sum(1) / 2
        return logits


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(W.copy()))

    def forward(self, samples: Tensor) -> Tensor:
        return samples * self.weight


def config_of(**objective: Any) -> Config:
    network = {"architecture": "mlp", "normalization": "none"}
    return parse_config(
        {
            "run_dir": "unused",
            "seed": SEED,
            "data": {"kind": "points", "path": "unused"},
            "generator": network,
            "discriminator": network,
            "objective": objective,
            "training": {"steps": STEPS, "batch_size": COUNT},
        }
    )


def batch() -> MicroBatch:
    fixed = torch.Generator().manual_seed(1)
    latents, reals = (torch.randn(COUNT, 2, generator=fixed, dtype=torch.float64) for _ in range(2))
    return MicroBatch(torch.arange(40, 40 + COUNT), latents, None, reals, None)


REALS = batch().reals.numpy()  # type: ignore[union-attr]
FAKES = batch().latents.numpy() @ A.T


def logit(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x @ W + (x**2).sum(1) / 2
    return found


def slope_norm(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.sqrt(((W + x) ** 2).sum(1))
    return found


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def discriminator_loss(images: int = 0, update: int = 0, **objective: Any) -> tuple[float, dict[str, Tensor]]:
    loss, parts = DiscriminatorObjective(Bowl(), Linear(), config_of(**objective), None)(batch(), images, update)
    return loss.item(), parts


def generator_loss(images: int = 0, **objective: Any) -> float:
    loss, _ = GeneratorObjective(Linear(), Bowl(), config_of(**objective), None)(batch(), images)
    return loss.item()


def test_r1_is_of_reals_and_r2_of_fakes() -> None:
    plain = softplus(-logit(REALS)).mean() + softplus(logit(FAKES)).mean()
    assert discriminator_loss()[0] == pytest.approx(plain)
    r1, r2 = (3.0 / 2 * (slope_norm(x) ** 2).mean() for x in (REALS, FAKES))
    assert discriminator_loss(r1={"gamma": 3.0})[0] == pytest.approx(plain + r1)
    assert discriminator_loss(r2={"gamma": 3.0})[0] == pytest.approx(plain + r2)


def test_a_lazy_penalty_is_k_times_as_large_in_each_kth_update() -> None:
    """So that its mean over k updates is the penalty; what is reported of it is the penalty itself."""
    plain, penalty = discriminator_loss()[0], 3.0 / 2 * (slope_norm(REALS) ** 2).mean()
    losses = [discriminator_loss(update=update, r1={"gamma": 3.0, "every": 4}) for update in range(8, 12)]
    assert [loss for loss, _ in losses] == pytest.approx([plain + 4 * penalty, plain, plain, plain])
    assert ["loss/r1" in parts for _, parts in losses] == [True, False, False, False]
    assert float(losses[0][1]["loss/r1"]) == pytest.approx(penalty)


def test_gamma_follows_its_schedule() -> None:
    plain, square = discriminator_loss()[0], (slope_norm(REALS) ** 2).mean()
    half_way = discriminator_loss(
        images=STEPS * COUNT // 2, r1={"gamma": {"start": 3.0, "end": 1.0, "shape": "cosine"}}
    )[0]
    assert half_way == pytest.approx(plain + 2.0 / 2 * square)


def test_wgan_gp_is_algorithm_1_of_gulrajani() -> None:
    """With one alpha for each sample, drawn at the sample's address."""
    fractions = randomness.uniform(SEED, "discriminator/interpolation", torch.arange(40, 40 + COUNT), ())
    alphas = fractions.double().numpy()[:, None]
    assert len(set(alphas.ravel().tolist())) == COUNT
    points = alphas * FAKES + (1 - alphas) * REALS
    penalty = 10 * ((slope_norm(points) - 1) ** 2).mean()
    drift = 0.001 * (logit(REALS) ** 2).mean()
    expected = logit(FAKES).mean() - logit(REALS).mean() + penalty + drift
    found, parts = discriminator_loss(adversarial="wasserstein", gradient_penalty={}, drift=0.001)
    assert found == pytest.approx(expected, rel=1e-6)
    assert float(parts["divergence/wasserstein"]) == pytest.approx(logit(REALS).mean() - logit(FAKES).mean())


def test_r3gan_is_paired_with_both_penalties() -> None:
    both = {"gamma": 0.5}
    found, _ = discriminator_loss(adversarial="relativistic_paired", r1=both, r2=both)
    penalties = 0.25 * ((slope_norm(REALS) ** 2).mean() + (slope_norm(FAKES) ** 2).mean())
    assert found == pytest.approx(softplus(logit(FAKES) - logit(REALS)).mean() + penalties)
    assert generator_loss(adversarial="relativistic_paired") == pytest.approx(
        softplus(logit(REALS) - logit(FAKES)).mean()
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("non_saturating", softplus(-logit(FAKES)).mean()),
        ("minimax", -softplus(logit(FAKES)).mean()),
        ("hinge", -logit(FAKES).mean()),
        ("least_squares", ((logit(FAKES) - 1) ** 2).mean() / 2),
    ],
)
def test_generators(family: str, expected: float) -> None:
    assert generator_loss(adversarial=family) == pytest.approx(expected)


def test_smoothed_targets_are_the_discriminators_alone() -> None:
    real, fake = logit(REALS), logit(FAKES)
    expected = (0.9 * softplus(-real) + 0.1 * softplus(real)).mean() + softplus(fake).mean()
    assert discriminator_loss(label_smoothing={"real": 0.9})[0] == pytest.approx(expected, rel=1e-6)
    assert generator_loss(label_smoothing={"real": 0.9}) == pytest.approx(softplus(-fake).mean())


def test_feature_matching_replaces_the_adversarial_term_or_joins_it() -> None:
    distance = (((REALS * W).mean(0) - (FAKES * W).mean(0)) ** 2).sum()
    assert generator_loss(feature_matching={"weight": 2.0}) == pytest.approx(2 * distance)
    joined = generator_loss(feature_matching={"weight": 2.0, "adversarial": True})
    assert joined == pytest.approx(softplus(-logit(FAKES)).mean() + 2 * distance)


@pytest.mark.parametrize(
    ("objective", "update", "passes"),
    [
        ({}, 0, 1),
        ({"r1": {"gamma": 1.0, "every": 2}}, 1, 1),
        ({"r1": {"gamma": 1.0, "every": 2}}, 2, 2),
        ({"r1": {"gamma": 1.0, "method": "finite_difference"}}, 0, 1),
    ],
)
def test_reals_and_fakes_share_a_pass_unless_a_penalty_is_exact(
    objective: dict[str, Any], update: int, passes: int
) -> None:
    """Of a discriminator that a pass does not change; moving vectors of spectral norm see both as before."""
    for network, expected in ((Bowl(), passes), (Moving(), 1 if "finite_difference" in str(objective) else 2)):
        seen: list[int] = []
        network.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
        config = config_of(r1=None) if not objective else config_of(**objective)
        DiscriminatorObjective(network, Linear(), config, None)(batch(), 0, update)
        assert len(seen) == expected
        assert sum(seen) >= 2 * COUNT


class Moving(Bowl):
    """As the discriminator, and counts its passes."""

    moving_buffers = ("passes",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.passes: Tensor

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        self.passes += 1
        return super().forward(samples, labels)


def test_instance_noise_is_on_all_that_the_discriminator_sees() -> None:
    """Of reals and fakes that are all 0, D sees the noise alone: E D = E |x|^2 / 2 = sigma^2 for two numbers."""
    count = 20_000
    zeros = torch.zeros(count, 2, dtype=torch.float64)
    silent = MicroBatch(torch.arange(count), zeros, None, zeros, None)
    config = config_of(instance_noise={"sigma": {"start": 0.5, "end": 0}}, adversarial="relativistic_average")
    for images, sigma in ((0, 0.5), (STEPS * COUNT // 2, 0.25), (STEPS * COUNT, 0.0)):
        _, parts = DiscriminatorObjective(Bowl(), Linear(), config, None)(silent, images, 0)
        for kind in ("real", "fake"):
            assert float(parts[f"discriminator/{kind}_logit"]) == pytest.approx(sigma**2, abs=0.02 * sigma)


def test_the_players_update_only_themselves() -> None:
    for kind, own, other in ((DiscriminatorObjective, Bowl(), Linear()), (GeneratorObjective, Linear(), Bowl())):
        objective = kind(own, other, config_of(feature_matching={}), None)
        assert {id(parameter) for parameter in objective.parameters()} == {id(p) for p in own.parameters()}
        loss, _ = objective(batch(), *(0,) * (2 if kind is DiscriminatorObjective else 1))
        loss.backward()
        assert all(parameter.grad is not None for parameter in own.parameters())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in other.parameters())


def test_a_reference_batch_passes_in_bf16_unless_a_penalty_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.dtype]] = []
    normalize = VirtualBatchNorm.forward

    def look(layer: VirtualBatchNorm, activations: Tensor) -> Tensor:
        seen.append((len(activations), activations.dtype))
        return normalize(layer, activations)

    monkeypatch.setattr(VirtualBatchNorm, "forward", look)
    settings = {"architecture": "mlp", "normalization": "virtual", "reference_size": 4, "width": 3, "depth": 1}
    shape = SampleShape("points", dimensions=2)
    discriminator = build_discriminator(DiscriminatorConfig.model_validate(settings), shape)
    config = config_of(r1={"gamma": 1.0, "every": 2})
    objective = DiscriminatorObjective(discriminator, Linear().float(), config, torch.bfloat16)
    floats = MicroBatch(
        *(value.float() if value is not None and value.is_floating_point() else value for value in batch())
    )
    apart = [(4, torch.float32), (COUNT, torch.float32), (COUNT, torch.bfloat16)]
    for update, expected in ((0, apart), (1, [(4, torch.bfloat16), (2 * COUNT, torch.bfloat16)])):
        seen.clear()
        objective(floats, 0, update)[0].backward()
        assert seen == expected


def test_divergences_that_losses_estimate() -> None:
    """With the optimal logits log p/q of p = (3/4, 1/4) and q = (1/4, 3/4), by their frequencies, JS is by hand."""
    optimal = torch.tensor([math.log(3.0), math.log(3.0), math.log(3.0), -math.log(3.0)], dtype=torch.float64)
    found = scalars.discriminator_scalars(LOSSES["minimax"].options, optimal, -optimal)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(
        0.5
    )  # KL(p || m), and by symmetry KL(q || m), with m = (1/2, 1/2)
    assert float(found["divergence/jensen_shannon"]) == pytest.approx(expected)
    assert float(found["discriminator/real_probability"]) == pytest.approx(0.75 * 0.75 + 0.25 * 0.25)


def test_only_a_cross_entropys_outputs_are_read_as_probabilities() -> None:
    logits = torch.tensor([1.0, 2.0])
    for family, facts in ((name, built_in.options) for name, built_in in LOSSES.items()):
        found = {name.partition("/")[2] for name in scalars.discriminator_scalars(facts, logits, -logits)}
        divergence = {"wasserstein": {"wasserstein"}}.get(family, set())
        if family in ("minimax", "non_saturating"):
            divergence = {"real_probability", "fake_probability", "jensen_shannon"}
        assert found == {"real_logit", "fake_logit"} | divergence, family


def test_diversity_is_the_mean_difference_of_neighbors() -> None:
    samples = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0], [5.0, 9.0], [100.0, 0.0]])
    assert float(scalars.diversity("of", samples)["of"]) == pytest.approx((2 + 0 + 0 + 4) / 4)
    assert scalars.diversity("of", samples[:1]) == {}


class Shifted(nn.Module):
    """A network that adds its label to what `inner` makes, and keeps the labels that it was called with."""

    feature_layer = "inner"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.called_with: list[list[int]] = []

    def forward(self, values: Tensor, labels: Tensor) -> Tensor:
        self.called_with.append(labels.tolist())
        out: Tensor = self.inner(values)
        return out + labels.view(-1, *[1] * (out.dim() - 1))


@pytest.mark.parametrize(
    "objective",
    [
        {"adversarial": "relativistic_paired", "r1": {"gamma": 1.0}, "r2": {"gamma": 1.0}},
        {"adversarial": "wasserstein", "gradient_penalty": {}},
    ],
    ids=["paired", "interpolated"],
)
def test_samples_that_are_compared_are_of_one_class(objective: dict[str, Any]) -> None:
    generator, discriminator = Shifted(Linear()), Shifted(Bowl())
    drawn, real = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, 1, 0, 2, 1, 0])
    config = config_of(**objective)
    fed = batch()._replace(labels=drawn, real_labels=real)
    DiscriminatorObjective(discriminator, generator, config, None)(fed, 0, 0)
    assert generator.called_with == [real.tolist()]
    passes = 3 if "gradient_penalty" in objective else 2
    assert [label for labels in discriminator.called_with for label in labels] == real.tolist() * passes
    generator.called_with.clear()
    discriminator.called_with.clear()
    compared = config.objective.generator_needs_reals
    fed = fed if compared else fed._replace(reals=None, real_labels=None)
    GeneratorObjective(generator, discriminator, config, None)(fed, 0)
    assert generator.called_with == [(real if compared else drawn).tolist()]
    assert discriminator.called_with == [(real if compared else drawn).tolist()] * (2 if compared else 1)
