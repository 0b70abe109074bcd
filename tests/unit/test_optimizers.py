"""RMSProp against torch's own, and steps that are canceled."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from distgan.config import OptimizerConfig
from distgan.distributed.engines.base import apply_settings, clip
from distgan.players.optimizers import build_optimizer
from distgan.schedule import optimizer_settings


def course(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def make() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2).double()), nn.Parameter(torch.ones(()).double())]


@pytest.mark.parametrize("alpha", [0.99, 0.9])
def test_rmsprop_is_torchs(alpha: float) -> None:
    ours, theirs = make(), make()
    config = OptimizerConfig(name="rmsprop", learning_rate=1e-2, alpha=alpha)
    course(build_optimizer(config, ours), ours, 10)
    course(torch.optim.RMSprop(theirs, lr=1e-2, alpha=alpha, eps=1e-8), theirs, 10)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_adam_corrects_the_bias_by_the_current_betas() -> None:
    """Kingma and Ba, algorithm 1, where beta2 rises from 0.9 to 0.99 over 40 images: 1 - beta2^t with today's beta2."""
    values = {"learning_rate": 0.1, "betas": [0, {"start": 0.9, "end": 0.99, "over": 0.04, "shape": "cosine"}]}
    config = OptimizerConfig.model_validate(values)
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = build_optimizer(config, [parameter])
    theta, square = parameter.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(8):
        beta = 0.99 - 0.09 * (1 + math.cos(math.pi * min(1, 8 * step / 40))) / 2
        gradient = torch.tensor([1.0, 3.0], dtype=torch.float64) * (step + 1)
        apply_settings(optimizer, optimizer_settings(config, step, 8 * step, 10**6))
        parameter.grad = gradient.clone()
        optimizer.step()
        square = beta * square + (1 - beta) * gradient**2
        theta = theta - 0.1 * gradient / ((square / (1 - beta ** (step + 1))).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), theta, rtol=1e-12, atol=1e-12)


def test_adam_scaled_for_a_lazy_regularizer() -> None:
    """Karras et al. 2020, appendix B: with c = k / (k + 1), the betas to the power c; k = 3."""
    ours, theirs = make(), make()
    config = OptimizerConfig(name="adam", learning_rate=1e-2, betas=(0.5, 0.9), lazy_interval=3)
    course(build_optimizer(config, ours), ours, 10)
    course(torch.optim.Adam(theirs, lr=1e-2, betas=(0.5**0.75, 0.9**0.75)), theirs, 10)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert optimizer_settings(config, 0, 0, 10) == {"lr": pytest.approx(0.75e-2)}
    values = {"betas": [0.5, {"start": 0.9, "end": 0.99, "over": 1}], "lazy_interval": 3}
    scheduled = OptimizerConfig.model_validate(values)
    assert optimizer_settings(scheduled, 0, 500, 10)["betas"] == pytest.approx((0.5**0.75, 0.945**0.75))
    with pytest.raises(ValidationError, match="lazy_interval"):
        OptimizerConfig(name="rmsprop", lazy_interval=3)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_a_canceled_step_changes_nothing(name: str) -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    config = OptimizerConfig.model_validate({"name": name})
    optimizer = build_optimizer(config, parameters)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None  # type: ignore[attr-defined]
    course(optimizer, parameters, 2)
    state = optimizer.state[parameters[0]]
    assert tuple(state) == config.facts.quantities
    before = [parameters[0].detach().clone(), *(value.clone() for value in state.values())]
    parameters[0].grad = torch.tensor([1.0, torch.inf, torch.nan])
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    after = [parameters[0].detach(), *state.values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adamax"])
def test_a_hook_can_cancel_a_step_of_torchs_classes(name: str) -> None:
    """As DeepSpeed's engine does it: torch runs the hooks of every class in the line of inheritance that has run."""
    parameters = [nn.Parameter(torch.ones(3))]
    config = OptimizerConfig.model_validate({"name": f"torch.optim:{name}", "learning_rate": 0.1})
    optimizer = build_optimizer(config, parameters)
    cancel, calls = torch.zeros(()), []

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        calls.append(1)
        optimizer.found_inf, optimizer.grad_scale = cancel, None  # type: ignore[attr-defined]

    optimizer.register_step_pre_hook(before)
    parameters[0].grad = torch.ones(3)
    optimizer.step()
    changed = parameters[0].detach().clone()
    assert (changed < 1).all()
    cancel.fill_(1)
    optimizer.step()
    assert torch.equal(parameters[0].detach(), changed)
    assert len(calls) == 2


@pytest.mark.parametrize(("limit", "expected"), [(None, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_gradients_are_scaled_down_to_a_norm(limit: float | None, expected: list[float]) -> None:
    """Pascanu, Mikolov and Bengio 2013, algorithm 1: g max_norm / |g| where |g| = 5 is above it."""
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    clip(parameters, torch.tensor(5.0), limit)
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx(expected, rel=1e-6)
