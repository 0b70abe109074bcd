"""Optimizers whose step the device can cancel without a host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distgan.config import OptimizerConfig


class RMSProp(torch.optim.Optimizer):
    """theta -= rate * g / (sqrt(v) + eps), v = alpha * v + (1 - alpha) * g^2, v = 0 at first (Hinton 2012).

    If the attribute `found_inf` is 1, a step changes nothing, as in torch's fused optimizers. torch has no fused
    RMSProp.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, alpha: float, eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["square_avg"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            squares = [self.state[parameter]["square_avg"] for parameter in parameters]
            weight = torch.full((), 1.0 - group["alpha"], dtype=torch.float64, device=parameters[0].device)
            if self.found_inf is not None:
                # torch.where, because 0 times an infinite gradient is NaN.
                gradients = [torch.where(self.found_inf > 0, 0.0, gradient) for gradient in gradients]
                weight = weight * (1.0 - self.found_inf)
            change = torch._foreach_mul(gradients, gradients)
            torch._foreach_sub_(change, squares)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(squares, change)
            denominator = torch._foreach_sqrt(squares)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(parameters, gradients, denominator, value=-group["lr"])


QUANTITIES = {"adam": ("step", "exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",)}
"""Optimizer state per parameter, by optimizer name."""


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of one player."""
    if config.name == "rmsprop":
        return RMSProp(parameters, lr=config.learning_rate, alpha=config.alpha, eps=config.eps)
    return torch.optim.Adam(parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
