"""Penalties against their formulas, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from distgan.losses import gradient_penalties


def test_a_zero_centered_penalty_of_a_quadratic_discriminator() -> None:
    # D(x) = s |x|^2 / 2 has gradient s x, so the penalty is gamma/2 s^2 mean |x|^2, and its slope in s twice that / s.
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    logits = scale * images.square().flatten(1).sum(1) / 2
    penalty = gradient_penalties.zero_centered(logits, images, gamma=3.0)
    expected = 1.5 * (1.5 * images.detach()).square().flatten(1).sum(1).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    (by_scale,) = torch.autograd.grad(penalty, scale)
    assert by_scale.item() == pytest.approx(2 * expected.item() / 1.5, rel=1e-12)


def linear_critic(slopes: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """D(x_i) = a_i sum(x_i) on samples of 4 numbers, whose gradient has norm 2 |a_i|."""
    points = torch.zeros(len(slopes), 1, 2, 2, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor(slopes, dtype=torch.float64, requires_grad=True)
    return (factors[:, None, None, None] * points).flatten(1).sum(1), points, factors


def test_norms_are_over_all_of_a_sample_and_means_over_samples() -> None:
    logits, points, _ = linear_critic([1.0, 2.0, -3.0])
    assert gradient_penalties.input_gradients(logits, points).norm(dim=1).tolist() == pytest.approx([2.0, 4.0, 6.0])
    penalty = gradient_penalties.gradient_penalty(logits, points, 10.0)
    assert penalty.item() == pytest.approx(10 * (1 + 9 + 25) / 3)


def test_targets_and_sides() -> None:
    logits, points, factors = linear_critic([0.25, 2.0])  # norms 0.5 and 4
    one_sided = gradient_penalties.gradient_penalty(logits, points, 1.0, one_sided=True)
    assert one_sided.item() == pytest.approx((0 + 9) / 2)
    (slopes,) = torch.autograd.grad(one_sided, factors)
    assert slopes.tolist() == pytest.approx([0.0, 3 * 2])  # 1/2 * 2 (norm - 1) * d norm / d a, which is 2
    logits, points, _ = linear_critic([0.25, 2.0])
    zero_centered = gradient_penalties.gradient_penalty(logits, points, 1.0, target=0.0)
    assert zero_centered.item() == pytest.approx((0.25 + 16) / 2)
    # progressive_growing_of_gans, loss.py: square(norms - wgan_target) * (wgan_lambda / wgan_target^2).
    for target in (750.0, 0.5, 1.0):
        logits, points, _ = linear_critic([0.25, 2.0])
        penalty = gradient_penalties.gradient_penalty(logits, points, 10.0, target)
        released = [(norm - target) ** 2 * (10.0 / target**2) for norm in (0.5, 4.0)]
        assert penalty.item() == pytest.approx(sum(released) / 2, rel=1e-12)


def test_a_gradient_of_zero_is_no_nan() -> None:
    logits, points, factors = linear_critic([0.0, 1.0])
    penalty = gradient_penalties.gradient_penalty(logits, points, 1.0)
    assert penalty.item() == pytest.approx((1 + 1) / 2)
    assert torch.autograd.grad(penalty, factors)[0].tolist() == pytest.approx([0.0, 2.0])


def test_drift() -> None:
    assert gradient_penalties.drift(torch.tensor([1.0, -3.0])).item() == pytest.approx(5.0)


def test_interpolates_lie_on_the_line_of_their_own_pair() -> None:
    reals, fakes = torch.randn(4, 3, 2, 2).double(), torch.randn(4, 3, 2, 2).double()
    fractions = torch.tensor([0.0, 0.25, 0.5, 0.99]).double()
    points = gradient_penalties.interpolate_samples(reals, fakes, fractions)
    for i, alpha in enumerate(fractions.tolist()):
        torch.testing.assert_close(points[i], reals[i] + alpha * (fakes[i] - reals[i]))


def test_dragans_points() -> None:
    reals = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    noise, fractions = torch.rand(6, 2, 3, 3).double(), torch.rand(6).double()
    paper = gradient_penalties.perturb_gaussian(reals, noise, 10.0)
    torch.testing.assert_close(paper, reals + math.sqrt(10.0) * noise)
    released = gradient_penalties.perturb_uniform(reals, noise, fractions)
    perturbed = reals + 0.5 * reals.std(correction=0) * noise
    torch.testing.assert_close(released, reals + fractions.view(-1, 1, 1, 1) * (perturbed - reals))
