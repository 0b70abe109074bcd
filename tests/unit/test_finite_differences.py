"""Zero-centered penalties by finite differences, against exact ones and against closed forms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgan.config import Config, parse_config
from distgan.errors import UserError
from distgan.networks import build_discriminator
from distgan.networks.layers.spectral_norm import add_spectral_norm, power_iteration_vectors
from distgan.networks.shape import SampleShape, sample_shape
from distgan.players.finite_differences import check_finite_differences, check_fractions
from distgan.players.objective import DiscriminatorObjective
from distgan.players.samples import MicroBatch

POINTS = SampleShape("points", dimensions=2)
BY_DIFFERENCES = {"gamma": 2.0, "method": "finite_difference"}


def config_of(kind: str = "points", discriminator: Any = None, **objective: Any) -> Config:
    data = {"points": {"kind": "points"}, "images": {"resolution": 16, "channels": 1}}[kind]
    network = {"architecture": "mlp"} if kind == "points" else {"architecture": "dcgan", "width": 4}
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", **data},
            "generator": network,
            "discriminator": {**network, "normalization": "none", **(discriminator or {})},
            "objective": objective,
            "training": {"steps": 1, "batch_size": 8},
        }
    )


def batch_of(reals: Tensor, first: int = 0) -> MicroBatch:
    """A batch whose fakes are the reals, for a generator that returns its latents."""
    return MicroBatch(torch.arange(first, first + len(reals)), reals, None, reals, None)


class Same(nn.Module):
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents


class Dense(nn.Sequential):
    """A smooth discriminator of points."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__(nn.Linear(2, 8), nn.SiLU(), *middle, nn.Linear(8, 1))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = super().forward(samples)
        return logits.squeeze(1)


class Slope(nn.Module):
    """D(x) = w . x over all elements."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.passes = 0

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        self.passes += 1
        return samples.flatten(1) @ self.weight


def penalties(network: nn.Module, batch: MicroBatch, config: Config) -> dict[str, Tensor]:
    return DiscriminatorObjective(network, Same(), config, None)(batch, 0, 0)[1]


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_linear_discriminator_is_penalized_by_its_squared_norm(antithetic: bool) -> None:
    # (w.n)^2 has the mean |w|^2 and the variance 2 |w|^4.
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64)
    count, squared = 4000, 4.25
    config = config_of(r1={**BY_DIFFERENCES, "antithetic": antithetic}, r2={**BY_DIFFERENCES, "gamma": 1.0})
    network = Slope(weight)
    found = penalties(network, batch_of(torch.randn(count, 2, dtype=torch.float64)), config)
    error = 4 * math.sqrt(2 / count) * squared
    assert found["loss/r1"].item() == pytest.approx(2.0 / 2 * squared, abs=error)
    assert found["loss/r2"].item() == pytest.approx(1.0 / 2 * squared, abs=error / 2)
    assert network.passes == 1


@pytest.mark.parametrize("options", [{}, {"antithetic": False, "sigma": 1e-4}, {"fraction": 0.5, "draws": 2}])
def test_value_and_gradient_agree_with_the_exact_penalty_of_a_smooth_discriminator(options: dict[str, Any]) -> None:
    network, config = Dense(), config_of(r1={**BY_DIFFERENCES, "sigma": 1e-3, **options})
    fixed = torch.Generator().manual_seed(1)
    reals = torch.randn(2, 2, generator=fixed, dtype=torch.float64).repeat_interleave(2, 0)
    direction = [torch.randn(p.shape, generator=fixed, dtype=torch.float64) for p in network.parameters()]

    def value_and_slope(config: Config, first: int) -> tuple[float, float]:
        penalty = penalties_with_graph(network, batch_of(reals, first), config)
        gradients = torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
        return penalty.item(), slope

    exact = value_and_slope(config_of(r1={"gamma": 2.0}), 0)
    drawn = torch.tensor([value_and_slope(config, 100 * draw) for draw in range(200)])
    errors = drawn.std(0) / math.sqrt(len(drawn))
    assert (drawn.mean(0) - torch.tensor(exact)).abs().le(3 * errors).all()
    assert errors[0] < 0.2 * exact[0]


def penalties_with_graph(network: nn.Module, batch: MicroBatch, config: Config) -> Tensor:
    """R1 alone: the loss less the adversarial loss of the same logits, which are equal for reals and fakes."""
    objective = DiscriminatorObjective(network, Same(), config, None)
    with_penalty, parts = objective(batch, 0, 0)
    without, _ = DiscriminatorObjective(network, Same(), config_of(), None)(batch, 0, 0)
    penalty: Tensor = with_penalty - without
    assert penalty.item() == pytest.approx(parts["loss/r1"].item(), rel=1e-9)
    return penalty


def test_both_ends_of_a_difference_have_the_same_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("images", r1=BY_DIFFERENCES, augmentation={"augmentation": "diffaugment"})
    images = torch.randn(8, 1, 16, 16, dtype=torch.float64)
    network = Slope(torch.randn(256, dtype=torch.float64))
    assert penalties(network, batch_of(images), config)["loss/r1"] > 0
    normal = DiscriminatorObjective._normal

    def still(self: DiscriminatorObjective, purpose: str, batch: MicroBatch, like: Tensor) -> Tensor:
        return normal(self, purpose, batch, like) * (not purpose.startswith("finite differences"))

    monkeypatch.setattr(DiscriminatorObjective, "_normal", still)
    assert penalties(network, batch_of(images), config)["loss/r1"].item() < 1e-20


def test_penalties_at_augmented_samples_do_not_see_the_slope_of_the_augmentation() -> None:
    images, weight = torch.randn(512, 1, 16, 16, dtype=torch.float64), torch.ones(256, dtype=torch.float64)
    found = {
        place: penalties(
            Slope(weight),
            batch_of(images),
            config_of(
                "images",
                r1={**BY_DIFFERENCES, "draws": 4},
                augmentation={"augmentation": "diffaugment", "policy": ["cutout"], "penalties": place},
            ),
        )["loss/r1"].item()
        for place in ("clean", "augmented")
    }
    # Cutout removes about a quarter of the pixels, and at clean samples their slope with them.
    assert found["augmented"] == pytest.approx(256, rel=0.15)
    assert found["clean"] < 0.9 * found["augmented"]


def test_spectral_norm_moves_once_in_an_update_with_differences() -> None:
    network = Dense()
    add_spectral_norm(network)
    moved_once = copy.deepcopy(network)
    reals = torch.randn(8, 2, dtype=torch.float64)
    moved_once(reals)
    found = penalties(network, batch_of(reals), config_of(r1=BY_DIFFERENCES, r2=BY_DIFFERENCES))
    for ours, expected in zip(power_iteration_vectors(network), power_iteration_vectors(moved_once), strict=True):
        assert torch.equal(ours, expected)
    assert found["loss/r1"] < 2 * 2  # the norm of the gradient is at most about 1


def test_batch_statistics_are_of_one_kind_of_samples() -> None:
    class Centered(Slope):
        def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(samples - samples.mean(0))

    config = config_of(r1=BY_DIFFERENCES, discriminator={"normalization": "synchronized"})
    network = Centered(torch.tensor([1.0, 1.0], dtype=torch.float64))
    found = penalties(network, batch_of(torch.randn(8, 2, dtype=torch.float64)), config)
    assert network.passes == 4  # reals, fakes, and two ends
    assert found["discriminator/real_logit"].abs() < 1e-12


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Dense(nn.Dropout(0.5)), ["objective.r1", "randomness", "dropout", "method: exact"]),
        (nn.Sequential(Dense(), nn.Dropout(0.3)), ["objective.r1", "randomness"]),
    ],
)
def test_random_discriminators_are_refused(network: nn.Module, expected: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        check_finite_differences(Squeezed(network), config_of(r1=BY_DIFFERENCES), POINTS)
    assert all(part in str(raised.value) for part in expected)


class Squeezed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        found: Tensor = self.network(samples)
        return found


def test_kinks_are_found_in_functions_and_modules_and_only_told() -> None:
    config = config_of(r2=BY_DIFFERENCES)
    assert check_finite_differences(Dense(), config, POINTS) == []
    assert check_finite_differences(Dense(nn.LeakyReLU()), config_of(r1={"gamma": 1.0}), POINTS) == []
    (told,) = check_finite_differences(Dense(nn.LeakyReLU()), config, POINTS)
    assert "objective.r2.method" in told
    assert "LeakyRelu" in told
    images = config_of("images", r1=BY_DIFFERENCES, r2=BY_DIFFERENCES)
    shape = sample_shape(images.data)
    assert len(check_finite_differences(build_discriminator(images.discriminator, shape), images, shape)) == 2
    r3gan = config_of("images", {"architecture": "r3gan", "max_width": 8, "width": 8}, r1=BY_DIFFERENCES)
    (told,) = check_finite_differences(build_discriminator(r3gan.discriminator, shape), r3gan, shape)
    assert "LeakyRelu" in told  # it has no module for it


def test_spectral_norm_with_batch_statistics_is_refused() -> None:
    config = config_of("images", {"normalization": "synchronized", "spectral_norm": True}, r1=BY_DIFFERENCES)
    shape = sample_shape(config.data)
    with pytest.raises(UserError, match=r"spectral norm.*discriminator\.normalization"):
        check_finite_differences(build_discriminator(config.discriminator, shape), config, shape)


@pytest.mark.parametrize(
    ("penalty", "discriminator", "expected"),
    [
        ({"gamma": 1.0, "sigma": 0.1}, {}, ["r1.sigma", "finite_difference"]),
        ({**BY_DIFFERENCES, "fraction": 0}, {}, ["r1.fraction"]),
        ({**BY_DIFFERENCES, "fraction": 0.3}, {}, ["r1.fraction", "0.3", "0.25"]),
        ({**BY_DIFFERENCES, "sigma": 1e-9}, {}, ["r1.sigma", "greater than or equal to"]),
        ({**BY_DIFFERENCES, "draws": 0}, {}, ["r1.draws"]),
        ({**BY_DIFFERENCES, "fraction": 0.5}, {"normalization": "synchronized"}, ["r1.fraction", "normalization"]),
    ],
)
def test_settings_without_meaning_are_refused(penalty: Any, discriminator: Any, expected: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        config_of(discriminator=discriminator, r1=penalty)
    assert all(part in str(raised.value) for part in expected)


def test_a_fraction_is_a_whole_number_of_samples() -> None:
    config = config_of(r1={**BY_DIFFERENCES, "fraction": 0.25})
    check_fractions(config, 8)
    with pytest.raises(UserError, match=r"objective\.r1\.fraction = 0\.25: 4 does not divide the 6 samples"):
        check_fractions(config, 6)


def test_the_step_depends_on_the_kind_of_data() -> None:
    penalty = config_of(r1=BY_DIFFERENCES).objective.r1
    assert penalty is not None
    assert [penalty.step(kind) for kind in ("images", "text", "points", "latents")] == [0.03, 0.03, 0.1, 0.1]
