"""Adversarial losses against their closed forms, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import AdversarialConfig, LabelSmoothingConfig
from distgan.config.objective import LOSSES
from distgan.losses.adversarial import draw_targets, targeted_cross_entropy

ADVERSARIAL = {name: AdversarialConfig(family=name).build() for name in LOSSES}

logit = st.floats(-50, 50, width=32)
batches = st.integers(1, 6).flatmap(
    lambda n: st.tuples(st.lists(logit, min_size=n, max_size=n), st.lists(logit, min_size=n, max_size=n))
)


def both(family: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    return ADVERSARIAL[family].discriminator, ADVERSARIAL[family].generator


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def loss_and_gradients(loss: Callable[..., torch.Tensor], *logits: list[float]) -> tuple[float, list[list[float]]]:
    tensors = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in logits]
    value = loss(*tensors)
    value.backward()
    return value.item(), [[] if t.grad is None else t.grad.tolist() for t in tensors]


@given(logit, logit)
def test_discriminator_loss_is_the_negated_value_function(real: float, fake: float) -> None:
    for family in ("minimax", "non_saturating"):
        loss, ((by_real,), (by_fake,)) = loss_and_gradients(ADVERSARIAL[family].discriminator, [real], [fake])
        assert loss == pytest.approx(-log_sigmoid(real) - log_sigmoid(-fake), rel=1e-8, abs=1e-30)
        # dL/dlogit, from Goodfellow et al. 2014, eq. 1: -(1 - D(x)) on reals, D(G(z)) on fakes.
        assert by_real == pytest.approx(-sigmoid(-real), rel=1e-8, abs=1e-30)
        assert by_fake == pytest.approx(sigmoid(fake), rel=1e-8, abs=1e-30)


@given(logit)
def test_generator_losses_and_gradients(fake: float) -> None:
    closed_forms = {
        "minimax": (log_sigmoid(-fake), -sigmoid(fake)),
        "non_saturating": (-log_sigmoid(fake), -sigmoid(-fake)),
    }
    for family, (value, slope) in closed_forms.items():
        loss, (_, (by_fake,)) = loss_and_gradients(ADVERSARIAL[family].generator, [0.0], [fake])
        assert loss == pytest.approx(value, rel=1e-8, abs=1e-30)
        assert by_fake == pytest.approx(slope, rel=1e-8, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropies_are_finite_where_logits_are_large(dtype: torch.dtype) -> None:
    logits = torch.tensor([-50.0, 50.0], dtype=dtype, requires_grad=True)
    for family in ("minimax", "non_saturating"):
        for loss in both(family):
            (gradient,) = torch.autograd.grad(loss(logits, logits), logits)
            assert gradient.isfinite().all()


def test_the_losses_of_an_undecided_discriminator() -> None:
    zeros = torch.zeros(4)
    assert ADVERSARIAL["minimax"].discriminator(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert ADVERSARIAL["minimax"].generator(zeros, zeros).item() == pytest.approx(-math.log(2))


@given(batches)
def test_the_other_families_are_their_formulas(logits: tuple[list[float], list[float]]) -> None:
    real, fake = logits
    bar_real, bar_fake = mean(real), mean(fake)
    expected = {
        "least_squares": (
            0.5 * mean([(r - 1) ** 2 for r in real]) + 0.5 * mean([f**2 for f in fake]),
            0.5 * mean([(f - 1) ** 2 for f in fake]),
        ),
        "hinge": (
            mean([max(0, 1 - r) for r in real]) + mean([max(0, 1 + f) for f in fake]),
            -bar_fake,
        ),
        "wasserstein": (bar_fake - bar_real, -bar_fake),
        "relativistic_paired": (
            mean([-log_sigmoid(r - f) for r, f in zip(real, fake, strict=True)]),
            mean([-log_sigmoid(f - r) for r, f in zip(real, fake, strict=True)]),
        ),
        "relativistic_average": (
            0.5 * (mean([-log_sigmoid(r - bar_fake) for r in real]) + mean([-log_sigmoid(bar_real - f) for f in fake])),
            0.5 * (mean([-log_sigmoid(bar_fake - r) for r in real]) + mean([-log_sigmoid(f - bar_real) for f in fake])),
        ),
        "relativistic_average_least_squares": (
            0.5 * (mean([(r - bar_fake - 1) ** 2 for r in real]) + mean([(f - bar_real + 1) ** 2 for f in fake])),
            0.5 * (mean([(r - bar_fake + 1) ** 2 for r in real]) + mean([(f - bar_real - 1) ** 2 for f in fake])),
        ),
        "relativistic_average_hinge": (
            0.5 * (mean([max(0, 1 - (r - bar_fake)) for r in real]) + mean([max(0, 1 + (f - bar_real)) for f in fake])),
            0.5 * (mean([max(0, 1 + (r - bar_fake)) for r in real]) + mean([max(0, 1 - (f - bar_real)) for f in fake])),
        ),
    }
    assert expected.keys() | {"minimax", "non_saturating"} == ADVERSARIAL.keys()
    for family, (discriminator, generator) in expected.items():
        found = [loss_and_gradients(loss, real, fake)[0] for loss in both(family)]
        assert found == pytest.approx([discriminator, generator], rel=1e-9, abs=1e-9), family


def test_gradients_flow_through_the_means_of_a_relativistic_average() -> None:
    # RaLSGAN of one sample a side: 1/2 (r - f - 1)^2 + 1/2 (f - r + 1)^2 = (r - f - 1)^2, whose slope in r is
    # 2 (r - f - 1); were the means constants, it would be half of that.
    loss = ADVERSARIAL["relativistic_average_least_squares"].discriminator
    _, ((by_real,), (by_fake,)) = loss_and_gradients(loss, [3.0], [0.5])
    assert (by_real, by_fake) == pytest.approx((3.0, -3.0))


@given(logit, st.floats(0, 1), st.floats(0, 1))
def test_targets_are_cross_entropies(value: float, alpha: float, beta: float) -> None:
    one = torch.tensor([value], dtype=torch.float64)
    loss = targeted_cross_entropy(one, one, *torch.tensor([[alpha], [beta]], dtype=torch.float64))
    expected = -sum(t * log_sigmoid(value) + (1 - t) * log_sigmoid(-value) for t in (alpha, beta))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.9, 0.0), (0.8, 0.1)])
def test_the_optimal_discriminator_of_smoothed_targets(alpha: float, beta: float) -> None:
    """D* = (alpha p + beta q) / (p + q), for three points with these probabilities (Salimans et al. 2016)."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def expected_loss() -> torch.Tensor:
        optimizer.zero_grad()
        each = zip(p, q, logits, strict=True)
        none = torch.zeros(1, dtype=torch.float64)
        loss = sum(
            (
                px * (targeted_cross_entropy(x[None], none, alpha * ones, 0.5 * ones) - math.log(2))
                + qx * (targeted_cross_entropy(none, x[None], 0.5 * ones, beta * ones) - math.log(2))
                for px, qx, x in each
            ),
            start=torch.zeros((), dtype=torch.float64),
        )
        loss.backward()
        return loss

    optimizer.step(expected_loss)  # type: ignore[arg-type]
    torch.testing.assert_close(logits.detach().sigmoid(), (alpha * p + beta * q) / (p + q), rtol=1e-5, atol=1e-6)


def test_drawn_targets() -> None:
    config = LabelSmoothingConfig(real=(0.7, 1.0), fake=0.1, flip=0.25)
    uniforms = torch.tensor([[0.0, 0.5, 0.9, 0.9], [0.5, 0.5, 0.1, 0.9], [0.5, 0.5, 0.9, 0.2]])
    real, fake = draw_targets(config, uniforms)
    # The second sample's real target is flipped to the fake one, the third's fake target to the real one.
    assert real.tolist() == pytest.approx([0.7, 0.1, 0.85])
    assert fake.tolist() == pytest.approx([0.1, 0.1, 0.85])


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_facts_of_a_family_are_those_of_its_losses(name: str) -> None:
    """A loss that looks at reals has a gradient there; one that compares a batch is no mean over the batch's parts."""
    facts = AdversarialConfig(family=name).facts
    real = torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-0.5, 0.9, 1.7, -2.0], dtype=torch.float64, requires_grad=True)
    losses = ADVERSARIAL[name]
    (gradient,) = torch.autograd.grad(losses.generator(real, fake), real, allow_unused=True)
    assert (gradient is not None and bool((gradient != 0).any())) == facts.needs_reals
    for loss in both(name):
        parts = (loss(real[:2], fake[:2]) + loss(real[2:], fake[2:])) / 2
        assert torch.isclose(loss(real, fake), parts) != facts.compares_batch
