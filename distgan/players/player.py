"""Player: a network and its objective, with the engine that trains it on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distgan.config import OptimizerConfig, WeightClippingConfig
from distgan.distributed import collectives
from distgan.distributed.blocks import declared_blocks
from distgan.distributed.runtime import Runtime
from distgan.networks.layers.normalization import normalization_parameters
from distgan.networks.moving import foreign_moving_buffers, moving_buffers
from distgan.networks.progressive import GrowingNetwork
from distgan.players.accumulator import ScalarAccumulator
from distgan.players.objective_base import Objective
from distgan.players.optimizers import build_optimizer


class Player:
    """A network with its objective, its engine and its counters of skipped updates."""

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        runtime: Runtime,
        *,
        clipping: WeightClippingConfig | None = None,
    ) -> None:
        self.role, self.objective = objective.role, objective
        self.network, self.opponent = objective.network, objective.opponent
        self.history = objective.history
        self.runtime = runtime
        self.accumulation = objective.accumulation
        _choose_parameters(self.network)
        make_optimizer = functools.partial(build_optimizer, config)
        blocks = [] if objective.whole_weights else declared_blocks(self.network)
        self.engine = runtime.engine(objective, self.network, make_optimizer, blocks)
        self.quantities: tuple[str, ...] | None = config.facts.quantities
        self.max_norm = config.max_gradient_norm
        self.clipping = clipping
        spared = [] if clipping is None or clipping.normalization else normalization_parameters(self.network)
        kept = {id(parameter) for parameter in spared}
        self._clipped = [parameter for parameter in self.network.parameters() if id(parameter) not in kept]
        device = runtime.device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)
        self.statistics = ScalarAccumulator()
        self.latest: list[dict[str, Tensor]] = []
        """Scalars of this rank's micro-batches in the last update."""

    def update(
        self,
        micro_batches: Iterable[object],
        arguments: tuple[object, ...],
        settings: Mapping[str, Any],
        *,
        before_change: Callable[[], None] | None = None,
    ) -> Tensor:
        """Do one optimizer step on the mean loss of `accumulation` micro-batches. Collective: call on every rank.

        Args:
            micro_batches: drawn one at a time. Each is released before the next one is drawn, so that the device holds
                the data and activations of one micro-batch.
            arguments: further arguments of the objective's forward, after the micro-batch.
            settings: values for the optimizer's parameter groups; see `schedule.optimizer_settings`.
            before_change: called before each change of a tensor that a checkpoint holds.

        Returns:
            0-d tensor: 1 if the update was applied, 0 if it was skipped, because the loss or gradient was not finite on
            some rank. A skipped update leaves weights, buffers and optimizer state unchanged.
        """
        moving = [tensor.clone() for tensor in self._moving]
        if moving and before_change is not None:
            before_change()
        parts: list[dict[str, Tensor]] = []
        with self.passing(arguments):
            for batch in micro_batches:  # not enumerate, which keeps a batch until it has drawn the next
                with self.engine.micro_batch(last=len(parts) + 1 == self.accumulation):
                    loss, values = self.engine.module(batch, *arguments)
                    # A loss that is not finite turns every gradient into NaN, and the gradient all-reduce spreads it to
                    # all ranks. So all ranks decide alike without further communication.
                    verdict = torch.where(loss.isfinite(), 1.0, torch.nan) / self.accumulation
                    self.engine.backward(loss * verdict)
                parts.append(values)
                del batch, loss
        assert len(parts) == self.accumulation
        if before_change is not None:
            before_change()
        norm = self.engine.step(settings, self.max_norm)
        applied = norm.isfinite().float()
        if self.clipping is not None:
            self._clip(self.clipping.limit, applied)
        if self.history is not None:
            with self.runtime.full_params(self.network):
                self.history.update(applied)
        for tensor, before in zip(self._moving, moving, strict=True):
            tensor.copy_(torch.where(applied > 0, tensor, before))
        # As DDP does with buffers: each rank's would follow its own part of the data.
        collectives.broadcast(foreign_moving_buffers(self.network) + foreign_moving_buffers(self.opponent))
        self.skipped += 1.0 - applied
        self.skipped_in_a_row = (self.skipped_in_a_row + 1.0) * (1.0 - applied)
        self.longest_streak = torch.maximum(self.longest_streak, self.skipped_in_a_row)
        self.latest = parts
        for values in parts:
            self.statistics.add({**values, f"gradient_norm/{self.role}": norm}, applied)
        return applied

    @contextmanager
    def passing(self, arguments: tuple[Any, ...]) -> Iterator[None]:
        """Context manager for the forward and backward passes of an update.

        Args:
            arguments: those of `update`.
        """
        twice = self.objective.differentiates_twice(*arguments)
        # Frozen through the backward pass, in which checkpointed blocks are run again.
        with self.runtime.passing(self.network, self.opponent, twice=twice), self.objective.frozen_opponent():
            yield

    def _clip(self, limit: float, applied: Tensor) -> None:
        """Clamp the weights to [-limit, limit] after an update (Arjovsky et al. 2017, algorithm 1).

        The released code clamps before each critic step instead, so its generator trains against an unclamped last
        critic step.
        """
        bound = torch.where(applied > 0, limit, torch.inf)
        self.engine.change_weights(self._clipped, lambda weight: weight.clamp_(-bound, bound))

    @property
    def _moving(self) -> list[Tensor]:
        """Tensors that a forward pass changes in place, in both players' networks."""
        return moving_buffers(self.network) + moving_buffers(self.opponent)

    @property
    def counters(self) -> dict[str, Tensor]:
        """Counters of skipped updates that a checkpoint stores: name -> 0-d tensor."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Run throw-away passes that fix the order of gradient buckets, so that a resume is bitwise.

        They change nothing else. Collective: call on every rank.
        """
        moving = [tensor.clone() for tensor in self._moving]
        with self.passing(arguments[1:]):
            self.engine.warm_up_buckets(arguments)
        for tensor, before in zip(self._moving, moving, strict=True):
            tensor.copy_(before)

    def follow_growth(self, *, keep_moments: bool) -> None:
        """Train only the active parameters of a growing network. Collective: call on every rank."""
        _choose_parameters(self.network)
        self.engine.update_param_groups(keep_moments=keep_moments)


def _choose_parameters(network: nn.Module) -> None:
    """Require gradients only of the parameters of a growing network that are active at its current level."""
    if not isinstance(network, GrowingNetwork):
        return
    parameters = network.active_parameters()
    active = {id(parameter) for parameter in parameters}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in active)
