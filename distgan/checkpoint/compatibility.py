"""Checks that a run can resume from a checkpoint: same config and data, and complete tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distgan import schedule
from distgan.checkpoint.contents import Description
from distgan.checkpoint.directory import USE_OLDER
from distgan.config import Config, flatten, parse_config
from distgan.config.data import SourceConfig
from distgan.data.index.table import Index
from distgan.data.kinds.latents import LatentSpace
from distgan.distributed.parts import Stored
from distgan.errors import UserError
from distgan.extensions import code_digests
from distgan.networks.progressive import GrowingNetwork
from distgan.players.player import Player


def validate_resume(
    path: Path,
    description: Description,
    now: Config,
    index: Index,
    world_size: int,
    accept: frozenset[str],
    decoder: str | None = None,
    teacher: str | None = None,
) -> None:
    """Raise UserError unless a run with this config, data and number of ranks can continue from the checkpoint.

    Args:
        accept: accepted differences, from `contents.ACCEPTABLE`.
        decoder: hash of the decoder of latents; None without one.
        teacher: hash of the network of `objective.alignment`; None without one.
    """
    then = parse_config(description.config, source=f"{path}/state.json")
    follows = schedule.used_after(then, description.step)
    for key, expected in follows._asdict().items():
        if (number := getattr(description, key)) != expected and "batch" not in description.accepted:
            raise UserError(
                f"{path}/state.json: {key}: found {number} at step {description.step}, expected {expected} "
                f"from its config: the file was changed; {USE_OLDER}"
            )
    found = description.data.fingerprint
    if found != index.fingerprint and "data" not in accept:
        paths = [config.data.path for config in (then, now)]
        mixed = any(isinstance(item, SourceConfig) for path in paths for item in path)
        sources = f" (it was {paths[0]}, and is {paths[1]})" if mixed and paths[0] != paths[1] else ""
        raise UserError(
            f"{path}: saved with data of fingerprint {found[:12]}, but data.path has {index.fingerprint[:12]}"
            f"{sources}; restore the data, set another run_dir, or continue on the new data with --accept data"
        )
    if tuple(description.vocabulary or ()) != (index.vocabulary or ()):
        raise UserError(
            f"{path}: its text has other characters than that of data.path, or in another order; restore the data and "
            "its index, or set another run_dir"
        )
    if problem := find_difference(description.latent_space, index):
        raise UserError(
            f"{path}: saved with other latents than those of data.path: {problem}; restore the data and its index, or "
            "set another run_dir"
        )
    if description.decoder is not None and decoder not in (None, description.decoder):
        raise UserError(
            f"{path}: saved with a decoder of hash {description.decoder[:12]}, but that of data.decoder is "
            f"{decoder[:12]}, so that its metrics would be of other images; restore it, or set another run_dir"
        )
    if description.teacher is not None and teacher not in (None, description.teacher):
        raise UserError(
            f"{path}: saved with a network of hash {description.teacher[:12]}, but that of objective.alignment.weights "
            f"is {teacher[:12]}, which changes the objective; restore it, or set another run_dir"
        )
    known = description.code
    digests = code_digests(now.code_paths)
    changed = [package for package, digest in digests.items() if known.get(package, "") not in ("", digest)]
    if changed and "code" not in accept:
        changed_code = "__main__, the notebook or script" if changed[0] == "__main__" else f"the package {changed[0]}"
        raise UserError(
            f"{path}: saved with other sources of {changed_code}, so that a resume would not be exact; "
            "restore that version, or continue with --accept code"
        )
    if then.seed != now.seed and "seed" not in accept:
        raise UserError(
            f"{path}: saved with seed = {then.seed}, but the config has seed = {now.seed}, which changes data order "
            f"and noise; set seed={then.seed}, or accept the change with --accept seed"
        )
    used = [
        [schedule.used_after(config, step) for step in (description.step, description.step + 1)]
        for config in (then, now)
    ]
    if used[0] != used[1] and "batch" not in accept:
        was, would = ([place.position for place in places] for places in used)
        raise UserError(
            f"{path}: {_batch_changes(then, now)} (the next step would use the real images {would[0]} to "
            f"{would[1]} instead of {was[0]} to {was[1]}, and `distgan trace` could no longer name the "
            "samples of a step); restore it, or accept the change with --accept batch"
        )
    latents = [schedule.generator_batch_size(config, description.images) for config in (then, now)]
    if latents[0] != latents[1] and "batch" not in accept:
        raise UserError(
            f"{path}: {_batch_changes(then, now)} (a generator update would use {latents[1]} latents instead of "
            f"{latents[0]}); restore it, or accept the change with --accept batch"
        )
    for role in ("discriminator", "generator"):
        before = schedule.statistics_sizes(then, description.images, description.world_size, role)
        for key, size in schedule.statistics_sizes(now, description.images, world_size, role).items():
            if before.get(key, size) != size and "statistics" not in accept:
                raise UserError(
                    f"{path}: {key}: batch statistics were over {before[key]} samples in updates of the {role}, but "
                    f"now they would be over {size}, which changes the objective; restore batch_size / "
                    "gradient_accumulation_steps and, if statistics are per rank, the "
                    f"{description.world_size} ranks, or accept the change with --accept statistics"
                )
    for role in ("generator", "discriminator"):
        sizes = [getattr(config, role).facts.reference_samples for config in (then, now)]
        if sizes[0] != sizes[1] and None not in sizes:
            raise UserError(
                f"{path}: {role}.reference_size was {sizes[0]}, but is {sizes[1]} now (default: batch_size / "
                "gradient_accumulation_steps, at most 128), and a reference batch cannot change; set "
                f"{role}.reference_size={sizes[0]}"
            )


def find_difference(trained: LatentSpace | None, index: Index) -> str:
    """Return how the latents of an index differ from those that a run was trained on; empty without a difference."""
    found = index.latents.space if index.latents else None
    if trained is None or found is None:
        return "" if trained == found else "found none, expected some" if trained else "found some, expected none"
    return trained.difference(found)


_BATCH_KEYS = (
    "training.batch_size", "training.generator_batch_size", "training.critic_steps", "training.initial_critic_steps",
    "training.extra_critic_steps", "training.generator_reals", "objective.adversarial", "objective.feature_matching",
    "objective.terms", "growth.first_resolution", "growth.stable_kimg", "growth.fade_kimg", "growth.batch_sizes",
)  # fmt: skip
"""Keys and sections that decide which images and latents a step uses."""


def _batch_changes(then: Config, now: Config) -> str:
    """Return the keys that decide which images a step uses and that differ, with both values."""
    before, after = (
        {key: "null" if value is None else value for key, value in flatten(config).items()} for config in (then, now)
    )
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return ", ".join(
        f"{key}: checkpoint {before.get(key, 'null')}, now {after.get(key, 'null')}"
        for key in changed
        if any(f"{key}.".startswith(f"{known}.") for known in _BATCH_KEYS)
    )


def check_optimizer(path: Path, player: Player, moments: Mapping[str, Stored]) -> None:
    """Raise UserError unless each parameter has all tensors of the optimizer state, or no parameter has any.

    In a growing network, only parameters that were active before have optimizer state.
    """
    file = f"{path}: {player.role}_optimizer"
    parameters = dict(player.network.named_parameters())
    if isinstance(player.network, GrowingNetwork):
        met = parameters.keys() & {key.rpartition("/")[0] for key in moments}
    else:
        met = {name for name, parameter in parameters.items() if parameter.requires_grad}
    known = player.quantities
    if known is None:  # an optimizer of the user's may keep other quantities for other parameters
        expected = {key for key in moments if key.rpartition("/")[0] in met}
    else:
        expected = {f"{name}/{quantity}" for name in met for quantity in known}
    if moments and expected != moments.keys():
        odd = min(expected ^ moments.keys())
        raise UserError(
            f"{file}: {odd} is {'missing' if odd in expected else 'unknown'}; resume with the optimizer of config.yaml "
            f"in the run folder, or {USE_OLDER}"
        )
    for key, tensor in moments.items():
        name, _, quantity = key.rpartition("/")
        dtype, shape = torch.float32, torch.Size()  # of `step`, which Adam counts per parameter
        if quantity != "step":
            dtype, shape = parameters[name].dtype, parameters[name].shape
        if known is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise UserError(
                f"{file}: {key}: found {tensor.dtype} of shape {tuple(tensor.shape)}, expected {dtype} of shape "
                f"{tuple(shape)}; resume with config.yaml of the run folder, or {USE_OLDER}"
            )


def check_history(path: Path, player: Player, saved: Mapping[str, Stored]) -> None:
    """Raise UserError unless the saved historical average is complete or absent."""
    own = own_tensors(player, saved)
    if player.history is None or not own:
        return
    for name, tensor in player.history.state().items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"{path}: history: {player.role}/{name} is missing or has another shape; {USE_OLDER}, or "
                "remove objective.historical_averaging"
            )


def check_counters(path: Path, player: Player, saved: Mapping[str, Tensor]) -> None:
    """Raise UserError unless each counter of a player is a finite number from 0."""
    for name in player.counters:
        counter = saved.get(f"{player.role}/{name}")
        if counter is None or counter.dim() or not counter.isfinite() or counter < 0:
            found = "missing" if counter is None else counter.item() if not counter.dim() else "a list"
            raise UserError(
                f"{path}: counters: {player.role}/{name}: found {found}, expected a number from 0; {USE_OLDER}"
            )


def check_controller(path: Path, saved: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the state of the adaptive augmentation is complete and possible, or absent."""
    found = {name: saved.get(f"controller/{name}") for name in ("probability", "signs", "images")}
    if all(tensor is None for tensor in found.values()):
        return
    for name, tensor in found.items():
        if tensor is None or tensor.dim() or not tensor.isfinite():
            said = "missing" if tensor is None else "a list" if tensor.dim() else f"{tensor.item()}"
            raise UserError(f"{path}: counters: controller/{name}: found {said}, expected a number; {USE_OLDER}")
    probability, signs, images = (float(tensor) for tensor in found.values() if tensor is not None)
    if not 0 <= probability <= 1 or images < 0 or abs(signs) > images * (1 + 1e-6):
        raise UserError(
            f"{path}: counters: controller: found probability {probability:g} and signs that sum to "
            f"{signs:g} of {images:g} images, expected a probability from 0 to 1 and at most one sign per image; "
            f"{USE_OLDER}"
        )


def own_tensors(player: Player, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return a player's tensors of a set, with the role removed from their names."""
    prefix = f"{player.role}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
