"""A player: a network and its objective, wrapped for all ranks, with the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distgan.config import OptimizerConfig, WeightClippingConfig
from distgan.distributed.runtime import Runtime
from distgan.networks.layers.normalisation import normalisation_parameters
from distgan.networks.layers.spectral import power_iteration_vectors
from distgan.networks.progressive import GrowingNetwork
from distgan.training.objective import Objective
from distgan.training.optimizers import QUANTITIES, build_optimizer
from distgan.training.statistics import Statistics


class Player:
    """A network with its objective (wrapped for all ranks), its optimizer, and its count of skipped updates."""

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        runtime: Runtime,
        *,
        clipping: WeightClippingConfig | None = None,
    ) -> None:
        self.role = objective.role
        self.network = objective.network
        self.history = objective.history
        self.runtime = runtime
        self.parameters = list(self.network.parameters())
        self.objective = objective
        self.wrap()
        self.optimizer = build_optimizer(config, self.parameters)
        self.quantities = QUANTITIES[config.name]
        self.clipping = clipping
        spared = [] if clipping is None or clipping.normalisation else normalisation_parameters(self.network)
        kept = {id(parameter) for parameter in spared}
        self._clipped = [parameter for parameter in self.parameters if id(parameter) not in kept]
        # All that a forward pass changes by itself, in this network and in the one it plays against.
        self._moving = power_iteration_vectors(self.network) + power_iteration_vectors(objective.opponent)
        device = runtime.device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)
        self.statistics = Statistics()

    def wrap(self) -> None:
        """Wrap the objective for all ranks, for those parameters that take part now. Every rank calls it."""
        growing = self.network if isinstance(self.network, GrowingNetwork) else None
        active = {id(parameter) for parameter in (growing.active_parameters() if growing else self.parameters)}
        for parameter in self.parameters:
            parameter.requires_grad_(id(parameter) in active)
        # The last wrapper lets go of the parameters when it is gone.
        self.engine: nn.Module = self.objective
        self.engine = self.runtime.wrap(self.objective)

    def update(self, micro_batches: Sequence[tuple[object, ...]], learning_rate: float) -> Tensor:
        """One optimizer step on the mean loss of some micro-batches, each the arguments of the objective's forward.

        Returns a 0-d tensor: 1 if the update was applied, 0 if its loss or gradient was not finite on some rank and
        it was skipped, in which case weights, buffers and optimizer state are as before.
        """
        moving = [tensor.clone() for tensor in self._moving]
        parts: list[dict[str, Tensor]] = []
        for number, arguments in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with self.runtime.gradients_stay_local(self.engine, not last):
                loss, values = self.engine(*arguments)
                # A loss that is not finite makes every gradient so, on all ranks once they are summed: all ranks
                # then come to the same verdict from the gradients, without a word.
                verdict = torch.where(loss.isfinite(), 1.0, torch.nan) / len(micro_batches)
                (loss * verdict).backward()
            parts.append(values)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = norm.isfinite().float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.found_inf = 1.0 - applied  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.clipping is not None:
            self._clip(self.clipping.limit, applied)
        if self.history is not None:
            self.history.update(applied)
        for tensor, before in zip(self._moving, moving, strict=True):
            tensor.copy_(torch.where(applied > 0, tensor, before))
        self.skipped += 1.0 - applied
        self.skipped_in_a_row = (self.skipped_in_a_row + 1.0) * (1.0 - applied)
        self.longest_streak = torch.maximum(self.longest_streak, self.skipped_in_a_row)
        for values in parts:
            self.statistics.add({**values, f"gradient_norm/{self.role}": norm}, applied)
        return applied

    @torch.no_grad()
    def _clip(self, limit: float, applied: Tensor) -> None:
        """Clamp the weights to [-limit, limit] after an update (Arjovsky et al. 2017, algorithm 1).

        Their released code clamps before each critic step instead, so that the generator there meets a critic whose
        last step is not clamped.
        """
        bound = torch.where(applied > 0, limit, torch.inf)
        for parameter in self._clipped:
            parameter.clamp_(-bound, bound)

    def settle(self, arguments: tuple[object, ...]) -> None:
        """Two throw-away passes, which leave no trace but in DDP.

        It arranges its buckets after the first backward. A resumed run would otherwise add its first gradients up in
        another order than the run it continues, and differ from it in the last bits from three ranks on.
        """
        moving = [tensor.clone() for tensor in self._moving]
        for _ in range(2):
            loss, _values = self.engine(*arguments)
            loss.backward()
            self.optimizer.zero_grad(set_to_none=True)
        for tensor, before in zip(self._moving, moving, strict=True):
            tensor.copy_(before)

    def forget_moments(self) -> None:
        """Start the optimizer anew."""
        self.optimizer.state.clear()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `PARAMETER/QUANTITY`; none for parameters that it has not met."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.network.named_parameters()}
        return {
            f"{names[parameter]}/{quantity}": value
            for parameter, state in self.optimizer.state.items()
            for quantity, value in state.items()
        }

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `optimizer_state`. The caller has checked that names and shapes fit."""
        parameters = dict(self.network.named_parameters())
        for key, tensor in tensors.items():
            name, _, quantity = key.rpartition("/")
            state = self.optimizer.state[parameters[name]]
            if quantity == "step":
                state[quantity] = tensor.to(self.runtime.device)
            else:
                # Fused kernels walk memory as it lies, so moments must lie as their parameter does.
                state[quantity] = torch.empty_like(parameters[name], requires_grad=False).copy_(tensor)
