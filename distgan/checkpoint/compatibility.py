"""Whether a run can go on from a checkpoint: it is of this config and data, and whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distgan import schedule
from distgan.checkpoint.contents import Description
from distgan.config import Config, parse_config
from distgan.data.index.table import Index
from distgan.errors import UserError
from distgan.networks.progressive import GrowingNetwork
from distgan.players.player import Player


def validate_resume(
    path: Path, description: Description, now: Config, index: Index, world_size: int, accept: frozenset[str]
) -> None:
    """Raise UserError unless a run of this config, data and ranks goes on where the checkpoint's left off.

    Args:
        accept: differences that are fine, of `description.ACCEPTABLE`.
    """
    then = parse_config(description.config, source=f"{path}/state.json")
    follows = schedule.position_after(then, description.step)
    if description.position != follows and "batch" not in description.accepted:
        raise UserError(
            f"{path}/state.json: position {description.position} at step {description.step}, where its config has "
            f"position {follows}; the file was changed, take another checkpoint"
        )
    found = description.data.fingerprint
    if found != index.fingerprint and "data" not in accept:
        raise UserError(
            f"{path}: saved from data with fingerprint {found[:12]}, but data.path has "
            f"{index.fingerprint[:12]}; restore the data, start another run_dir, or continue on "
            "the new data with --accept data"
        )
    if tuple(description.vocabulary or ()) != (index.vocabulary or ()):
        raise UserError(
            f"{path}: its text has other characters than that of data.path, or they are numbered otherwise; "
            "restore the data and their index, or start another run_dir"
        )
    if then.seed != now.seed and "seed" not in accept:
        raise UserError(
            f"{path}: saved with seed = {then.seed}, but the config has {now.seed}, which is another order of "
            f"the data and other noise; set seed={then.seed}, or change it all the same with --accept seed"
        )
    images = [
        [schedule.position_after(config, step) for step in (description.step, description.step + 1)]
        for config in (then, now)
    ]
    if images[0] != images[1] and "batch" not in accept:
        raise UserError(
            f"{path}: its next step would see the real images {images[0][0]} to {images[0][1]}, with this config "
            f"{images[1][0]} to {images[1][1]} (batch_size, critic_steps, initial_critic_steps, growth), and `distgan "
            "trace` would no longer tell which samples a step had; restore them (gradient_accumulation_steps is free "
            "to change), or use --accept batch"
        )
    before = schedule.statistics_sizes(then, description.position, description.world_size)
    for key, size in schedule.statistics_sizes(now, description.position, world_size).items():
        if before.get(key, size) != size and "statistics" not in accept:
            raise UserError(
                f"{path}: batch statistics were over {before[key]} samples for {key}, but now they would be over "
                f"{size}, which changes the objective; restore batch_size / accumulation and, where each rank has "
                f"statistics of its own, the {description.world_size} ranks, or use --accept statistics"
            )
    for role in ("generator", "discriminator"):
        sizes = [getattr(config, role).reference_size for config in (then, now)]
        if sizes[0] != sizes[1] and None not in sizes:
            raise UserError(
                f"{path}: {role}.reference_size was {sizes[0]}, but is {sizes[1]} now (where it is not given, it "
                f"is batch_size / accumulation, at most 128), and a reference batch cannot change; set "
                f"{role}.reference_size={sizes[0]}"
            )


def check_optimizer(path: Path, player: Player, moments: Mapping[str, Tensor]) -> None:
    """Raise UserError unless there are all of the optimizer's quantities for each parameter, or none at all.

    A network that grows has some for those parameters only that the optimizer has met.
    """
    file = f"{path}/{player.role}_optimizer.safetensors"
    parameters = dict(player.network.named_parameters())
    met = set(parameters)
    if isinstance(player.network, GrowingNetwork):
        met &= {key.rpartition("/")[0] for key in moments}
    expected = {f"{name}/{quantity}" for name in met for quantity in player.quantities}
    if moments and expected != moments.keys():
        odd = min(expected ^ moments.keys())
        raise UserError(
            f"{file}: {odd} is {'missing' if odd in expected else 'unknown'}; resume with the optimizer the run was "
            "started with (config.yaml in its folder), or take another checkpoint"
        )
    for key, tensor in moments.items():
        name, _, quantity = key.rpartition("/")
        dtype, shape = torch.float32, torch.Size()  # those of a step, which Adam counts by parameter
        if quantity != "step":
            dtype, shape = parameters[name].dtype, parameters[name].shape
        if tensor.shape != shape or tensor.dtype != dtype:
            raise UserError(
                f"{file}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {dtype} of shape "
                f"{tuple(shape)}; the checkpoint is damaged or of another architecture"
            )


def check_history(path: Path, player: Player, saved: Mapping[str, Tensor]) -> None:
    """Raise UserError unless an average over time is whole, or none was kept."""
    own = own_tensors(player, saved)
    if player.history is None or not own:
        return
    for name, tensor in player.history.state().items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"{path}/history.safetensors: {player.role}/{name} is missing or of another shape; "
                "take another checkpoint, or leave objective.historical_averaging out"
            )


def check_counters(path: Path, player: Player, saved: Mapping[str, Tensor]) -> None:
    """Raise UserError unless all of a player's counters are numbers from 0."""
    for name in player.counters:
        counter = saved.get(f"{player.role}/{name}")
        if counter is None or counter.dim() or not counter.isfinite() or counter < 0:
            found = "missing" if counter is None else counter.item() if not counter.dim() else "a list"
            raise UserError(
                f"{path}/counters.safetensors: {player.role}/{name}: found {found}, expected a number from 0; take "
                "another checkpoint"
            )


def own_tensors(player: Player, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a file's tensors that are a player's."""
    prefix = f"{player.role}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
