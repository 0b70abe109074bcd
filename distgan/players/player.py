"""A player: a network and its objective, with the engine that trains it on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from distgan.config import OptimizerConfig, WeightClippingConfig
from distgan.distributed.runtime import Runtime
from distgan.networks.layers.normalization import normalisation_parameters
from distgan.networks.layers.spectral_norm import power_iteration_vectors
from distgan.networks.progressive import GrowingNetwork
from distgan.players.accumulator import ScalarAccumulator
from distgan.players.objective import Objective
from distgan.players.optimizers import QUANTITIES, build_optimizer


class Player:
    """A network with its objective, its engine, and its count of skipped updates."""

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        runtime: Runtime,
        *,
        clipping: WeightClippingConfig | None = None,
    ) -> None:
        self.role = objective.role
        self.network, self.opponent = objective.network, objective.opponent
        self.history = objective.history
        self.runtime = runtime
        self.accumulation = objective.accumulation
        _choose_parameters(self.network)
        self.engine = runtime.engine(objective, self.network, functools.partial(build_optimizer, config))
        self.quantities = QUANTITIES[config.name]
        self.clipping = clipping
        spared = [] if clipping is None or clipping.normalization else normalisation_parameters(self.network)
        kept = {id(parameter) for parameter in spared}
        self._clipped = [parameter for parameter in self.network.parameters() if id(parameter) not in kept]
        device = runtime.device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)
        self.statistics = ScalarAccumulator()

    def update(
        self,
        micro_batches: Iterable[object],
        arguments: tuple[object, ...],
        learning_rate: float,
        *,
        before_change: Callable[[], None] | None = None,
    ) -> Tensor:
        """One optimizer step on the mean loss of `accumulation` micro-batches.

        Args:
            micro_batches: drawn one at a time; each is released before the next one is drawn, so that a device holds
                the data and activations of one.
            arguments: what the objective's forward takes besides a micro-batch.
            before_change: called before anything that a checkpoint holds changes.

        Returns a 0-d tensor: 1 if the update was applied, 0 if its loss or gradient was not finite on some rank and
        it was skipped, in which case weights, buffers and optimizer state are as before.
        """
        moving = [tensor.clone() for tensor in self._moving]
        if moving and before_change is not None:
            before_change()
        parts: list[dict[str, Tensor]] = []
        with self.runtime.full_params(self.opponent):
            for batch in micro_batches:  # not enumerate, which holds on to a batch until it has the next
                with self.engine.micro_batch(last=len(parts) + 1 == self.accumulation):
                    loss, values = self.engine.module(batch, *arguments)
                    # A loss that is not finite makes every gradient so, on all ranks once they are summed: all ranks
                    # then come to the same verdict from the gradients, without a word.
                    verdict = torch.where(loss.isfinite(), 1.0, torch.nan) / self.accumulation
                    self.engine.backward(loss * verdict)
                parts.append(values)
                del batch, loss
        assert len(parts) == self.accumulation
        if before_change is not None:
            before_change()
        norm = self.engine.step(learning_rate)
        applied = norm.isfinite().float()
        if self.clipping is not None:
            self._clip(self.clipping.limit, applied)
        if self.history is not None:
            with self.runtime.full_params(self.network):
                self.history.update(applied)
        for tensor, before in zip(self._moving, moving, strict=True):
            tensor.copy_(torch.where(applied > 0, tensor, before))
        self.skipped += 1.0 - applied
        self.skipped_in_a_row = (self.skipped_in_a_row + 1.0) * (1.0 - applied)
        self.longest_streak = torch.maximum(self.longest_streak, self.skipped_in_a_row)
        for values in parts:
            self.statistics.add({**values, f"gradient_norm/{self.role}": norm}, applied)
        return applied

    def _clip(self, limit: float, applied: Tensor) -> None:
        """Clamp the weights to [-limit, limit] after an update (Arjovsky et al. 2017, algorithm 1).

        Their released code clamps before each critic step instead, so that the generator there meets a critic whose
        last step is not clamped.
        """
        bound = torch.where(applied > 0, limit, torch.inf)
        self.engine.change_weights(self._clipped, lambda weight: weight.clamp_(-bound, bound))

    @property
    def _moving(self) -> list[Tensor]:
        """All that a forward pass changes by itself, in this network and in the one it plays against."""
        # Anew each time, because an engine may put other tensors in their place.
        return power_iteration_vectors(self.network) + power_iteration_vectors(self.opponent)

    @property
    def counters(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the skipped updates, 0-d tensors by name."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Throw-away passes where the engine needs them for a resume to be bitwise. They leave no trace but in it."""
        moving = [tensor.clone() for tensor in self._moving]
        with self.runtime.full_params(self.opponent):
            self.engine.warm_up_buckets(arguments)
        for tensor, before in zip(self._moving, moving, strict=True):
            tensor.copy_(before)

    def follow_growth(self, *, keep_moments: bool) -> None:
        """Train the parameters that take part in a grown network, and no others. Every rank calls it."""
        _choose_parameters(self.network)
        self.engine.update_param_groups(keep_moments=keep_moments)


def _choose_parameters(network: nn.Module) -> None:
    """Only parameters that take part in the network as it is now require gradients."""
    parameters = network.active_parameters() if isinstance(network, GrowingNetwork) else network.parameters()
    active = {id(parameter) for parameter in parameters}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in active)
