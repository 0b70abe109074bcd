"""Progressive growing during training: the networks become what the next step trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from distgan import schedule
from distgan.config import Config
from distgan.networks.progressive import GrowingNetwork

if TYPE_CHECKING:
    from distgan.training.state import TrainingState


def set_growth(networks: Iterable[nn.Module], growth: schedule.Growth | None) -> None:
    """Bring networks to a level and fade; None leaves them whole."""
    for network in networks:
        if growth is not None:
            assert isinstance(network, GrowingNetwork)
            network.set_growth(growth.level, growth.fade)


def doubts(config: Config) -> tuple[str, ...]:
    """A line if the run ends before its networks have grown up."""
    needed, last = schedule.steps_to_grow(config), config.training.steps
    if needed <= last:
        return ()
    side = schedule.resolution(config, schedule.position_after(config, last))
    return (
        f"training.steps = {last}: ends at {side} pixels a side, before the whole of the {config.data.resolution} "
        f"trains, which takes {needed} steps; raise it, or lower growth.stable_kimg and growth.fade_kimg",
    )


def grow(state: TrainingState) -> None:
    """Bring the networks to the level and fade of the state's position. Every rank calls it, after each step.

    Where other parameters take part than before, players follow, and their optimizers forget their moments if the run
    says so: that is at the start and at the end of each fade.
    """
    before, now = state.growth, schedule.growth(state.config, state.progress.position)
    if state.config.growth is None or before is None or now is None or before == now:
        return
    set_growth((state.generator.network, state.discriminator.network, state.average.network), now)
    state.growth = now
    if (before.level, before.fading) == (now.level, now.fading):
        return
    if state.config.training.compile:
        torch.compiler.reset()  # it would give up compiling after the eighth variant of a network
    for player in state.players:
        player.follow_growth(keep_moments=not state.config.growth.reset_optimizers)
    state.warm_up_buckets()
