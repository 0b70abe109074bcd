"""The quick ones of `tools/theory.py`: what theory says of players whose opponent does not move."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from tools.experiments import optimal_discriminator, vanishing_gradients
from tools.experiments.vanishing_gradients import Segments


def mixture(components: tuple[tuple[float, float], ...], x: float) -> float:
    return float(np.mean([stats.norm(mean, width).pdf(x) for mean, width in components]))


@pytest.mark.parametrize("case", optimal_discriminator.CASES, ids=lambda case: case.name)
def test_a_trained_discriminator_is_the_optimal_one(case: optimal_discriminator.Case) -> None:
    trained = optimal_discriminator.train(case, steps=400)

    def densities(x: float) -> tuple[float, float, float]:
        p, q = mixture(case.p.components, x), mixture(case.q.components, x)
        return p, q, (case.alpha * p + case.beta * q) / (p + q)

    for x in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0):
        place = int((optimal_discriminator.GRID - x).abs().argmin())
        assert trained.probabilities[place].item() == pytest.approx(densities(x)[2], abs=0.04)

    def jensen_shannon(x: float) -> float:
        p, q, _ = densities(x)
        return (p * math.log(2 * p / (p + q)) + q * math.log(2 * q / (p + q))) / 2

    divergence, _ = integrate.quad(jensen_shannon, -6, 6, limit=200)
    if (case.alpha, case.beta) == (1.0, 0.0):
        # The loss is minus the value V* = 2 JS - 2 log 2.
        assert trained.loss == pytest.approx(2 * math.log(2) - 2 * divergence, abs=2e-3)
        assert trained.divergence == pytest.approx(divergence, abs=1e-3)
    else:
        assert trained.divergence < divergence - 0.005
    if case.p == case.q:
        assert trained.error(case) < 0.005
        assert case.optimum.unique().tolist() == [0.5]


def test_the_gradient_of_minimax_vanishes_on_disjoint_supports() -> None:
    segments = Segments("minimax", 1.0)
    segments.train(30)
    before = abs(segments.gradient())
    segments.divergence()
    segments.train(270)
    assert before > 0.1
    assert abs(segments.gradient()) < 1e-4 * before
    segments.divergence()
    segments.train(1)
    assert segments.divergence() == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("theta", [1.0, -0.5])
def test_the_gradient_of_a_wasserstein_critic_does_not(theta: float) -> None:
    """The slope s that maximizes s |theta| - 10 (s - 1)^2, and the estimate s |theta|."""
    slope = 1 + abs(theta) / (2 * vanishing_gradients.LAMBDA)
    segments = Segments("Wasserstein, penalty", theta)
    segments.train(300)
    assert segments.gradient() == pytest.approx(math.copysign(slope, theta), rel=0.04)
    segments.divergence()
    segments.train(10)
    assert segments.divergence() == pytest.approx(slope * abs(theta), rel=0.04)
