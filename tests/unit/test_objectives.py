"""Losses and penalties against their formulas, worked out by hand or in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distgan.objectives import penalties
from distgan.objectives.adversarial import ADVERSARIAL

logit = st.floats(-50, 50)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


@given(logit, logit)
def test_discriminator_loss_is_the_negated_value_function(real: float, fake: float) -> None:
    for family in ("minimax", "non_saturating"):
        real_logit = torch.tensor([real], requires_grad=True)
        fake_logit = torch.tensor([fake], requires_grad=True)
        loss = ADVERSARIAL[family].discriminator(real_logit, fake_logit)
        loss.backward()
        r, f = real_logit.item(), fake_logit.item()
        assert loss.item() == pytest.approx(-log_sigmoid(r) - log_sigmoid(-f), rel=1e-5, abs=1e-30)
        # dL/dlogit, from Goodfellow et al. 2014, eq. 1: -(1 - D(x)) on reals, D(G(z)) on fakes.
        assert real_logit.grad.item() == pytest.approx(-sigmoid(-r), rel=1e-4, abs=1e-30)
        assert fake_logit.grad.item() == pytest.approx(sigmoid(f), rel=1e-4, abs=1e-30)


@given(logit)
def test_generator_losses_and_gradients(fake: float) -> None:
    closed_forms = {
        "minimax": (lambda x: log_sigmoid(-x), lambda x: -sigmoid(x)),
        "non_saturating": (lambda x: -log_sigmoid(x), lambda x: -sigmoid(-x)),
    }
    for family, (value, slope) in closed_forms.items():
        fake_logit = torch.tensor([fake], requires_grad=True)
        loss = ADVERSARIAL[family].generator(fake_logit)
        loss.backward()
        x = fake_logit.item()
        assert loss.item() == pytest.approx(value(x), rel=1e-5, abs=1e-30)
        assert fake_logit.grad.item() == pytest.approx(slope(x), rel=1e-4, abs=1e-30)


def test_the_losses_of_an_undecided_discriminator() -> None:
    zeros = torch.zeros(4)
    assert ADVERSARIAL["minimax"].discriminator(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert ADVERSARIAL["minimax"].generator(zeros).item() == pytest.approx(-math.log(2))


def test_r1_of_a_quadratic_discriminator() -> None:
    # D(x) = |x|^2 / 2 per sample has gradient x, so R1 = gamma/2 * mean |x|^2, with gradient gamma x_i / n.
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    logits = scale * images.square().flatten(1).sum(1) / 2
    penalty = penalties.r1(logits, images, gamma=3.0)
    expected = 1.5 * (1.5 * images.detach()).square().flatten(1).sum(1).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    # d/dscale of gamma/2 scale^2 mean |x|^2
    (by_scale,) = torch.autograd.grad(penalty, scale)
    assert by_scale.item() == pytest.approx(2 * expected.item() / 1.5, rel=1e-12)


def test_r1_is_per_sample() -> None:
    # D(x_i) = a_i * sum(x_i): squared gradient norm a_i^2 * (number of elements) for each sample on its own.
    images = torch.zeros(3, 2, 2, 2, requires_grad=True)
    slopes = torch.tensor([1.0, 2.0, -3.0])
    norms = penalties.squared_gradient_norms((slopes[:, None, None, None] * images).flatten(1).sum(1), images)
    assert norms.tolist() == pytest.approx([8.0, 32.0, 72.0])
