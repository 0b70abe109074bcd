"""Optimizers whose step can be canceled: by the device where they support it, else after a host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distgan import schedule
from distgan.config import OptimizerConfig, ScheduleConfig
from distgan.config.players import lazy_factor
from distgan.errors import UserError, blaming_code


class RMSProp(torch.optim.Optimizer):
    """theta -= rate * g / (sqrt(v) + eps), v = alpha * v + (1 - alpha) * g^2, v = 0 at first (Hinton 2012).

    If the attribute `found_inf` is 1, a step changes nothing, as in torch's fused optimizers. torch has no fused
    RMSProp. The caller sets a scheduled alpha in the parameter groups.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        alpha: float | ScheduleConfig = 0.99,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "alpha": schedule.value(alpha, 0, 1), "eps": eps})
        self._step_supports_amp_scaling = True
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


def adam(
    parameters: list[nn.Parameter],
    lr: float,
    *,
    betas: tuple[float | ScheduleConfig, float | ScheduleConfig] = (0.5, 0.999),
    eps: float = 1e-8,
    lazy_interval: int | None = None,
) -> torch.optim.Optimizer:
    """Return Adam (Kingma and Ba 2015) with fused kernels, whose step the device can cancel.

    Betas are scaled for a lazy regularizer here, and the learning rate by the schedule of each step. The caller sets
    scheduled betas in the parameter groups. Adam corrects the bias by 1 - beta^t with the current beta.
    """
    first, second = (schedule.value(beta, 0, 1) ** lazy_factor(lazy_interval) for beta in betas)
    return torch.optim.Adam(parameters, lr=lr, betas=(first, second), eps=eps, fused=True)


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of one player.

    Raises:
        UserError: the named class is not an optimizer, or its code is not allowed.
    """
    # The peak, because some optimizers refuse a rate of 0. Each step sets its own.
    rate = config.learning_rate
    peak = max(rate.start, rate.end) if isinstance(rate, ScheduleConfig) else rate
    if config.is_built_in:
        optimizer = config.build(parameters, peak)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer
    kind = config.load()
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        raise UserError(f"{config.name}: found {kind!r}, expected a subclass of torch.optim.Optimizer", everywhere=True)
    made: torch.optim.Optimizer = config.build(parameters, peak)
    # Of these the device can cancel any step; a first step of fused SGD leaves its momentum undefined.
    if not (isinstance(made, torch.optim.Adam) and getattr(made, "_step_supports_amp_scaling", False)):
        made = config.build(parameters, peak, technique=_cancelable(config.name, kind))
    return made


def _cancelable(name: str, kind: type[torch.optim.Optimizer]) -> Any:
    """Return a subclass whose `step` changes nothing if the attribute `found_inf` is 1, which the host waits for."""

    # Without the hooks that torch adds around `step`: they have run when the subclass's step runs.
    hooked = getattr(kind.step, "hooked", False)
    plain_step: Callable[..., Any] = kind.step.__wrapped__ if hooked else kind.step  # type: ignore[attr-defined]

    class Cancelable(kind):  # type: ignore[misc, valid-type]
        found_inf: Tensor | None = None

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            # Taken away first, because torch's other kernels refuse the attribute.
            canceled, self.found_inf = self.found_inf, None
            if canceled is not None and canceled.item():
                return None
            with blaming_code(
                f"{name}: its step failed; choose one that steps from dense gradients, without a closure",
                everywhere=True,
            ):
                return plain_step(self, closure)

    return Cancelable
