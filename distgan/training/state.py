"""All that a run is at one moment: what a checkpoint holds, how it is taken, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distgan
from distgan.config import Config, parse_config
from distgan.data.index import Index
from distgan.data.substitutions import Substitutions
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError, blaming
from distgan.networks.progressive import GrowingNetwork
from distgan.networks.shape import SampleShape, sample_shape
from distgan.training import checkpoint, schedule
from distgan.training.description import Description, load_description
from distgan.training.diagnosis import Diagnosis
from distgan.training.ema import AveragedGenerator
from distgan.training.growth import grow
from distgan.training.objective import blank_batch
from distgan.training.player import Player
from distgan.training.restore import check_numbers, read_network

ACCEPTABLE = ("data", "seed", "batch", "statistics")
"""Changes that `--accept` lets a resumed run make: each changes what the continued run means."""


@dataclass
class Progress:
    """The counters of a run. `position` is the whole state of the data, and the number of real images seen."""

    step: int = 0
    position: int = 0
    best: dict[str, Any] | None = None
    accepted: frozenset[str] = frozenset()
    """The changes of `ACCEPTABLE` that resumes of this course were allowed."""
    substitutions: Substitutions = field(default_factory=Substitutions)
    diagnosis: Diagnosis = field(default_factory=Diagnosis)


@dataclass
class TrainingState:
    """The players, the average, and the counters."""

    config: Config
    index: Index
    generator: Player
    discriminator: Player
    average: AveragedGenerator
    progress: Progress
    growth: schedule.Growth | None
    """Level and fade of the networks, where they grow."""

    @property
    def players(self) -> tuple[Player, Player]:
        """Both players."""
        return self.generator, self.discriminator

    @property
    def shape(self) -> SampleShape:
        """What samples are to the networks."""
        return run_shape(self.config, self.index)

    def settle(self) -> None:
        """Let the wrappers of both players arrange themselves (see `Player.settle`). Every rank calls it."""
        config, runtime, position = self.config, self.generator.runtime, self.progress.position
        if runtime.world_size > 1:
            shape = replace(self.shape, resolution=schedule.resolution(config, position))
            share = schedule.micro_batch(config, position) // runtime.world_size
            blank = blank_batch(share, config.generator.latent_size, shape, runtime.device)
            # Discriminator updates that no lazy penalty is due in have the number 1.
            self.discriminator.settle((blank, 0, 1))
            self.generator.settle((blank, 0))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File name -> tensors, as a checkpoint stores them: whole on rank 0. Every rank calls it."""
        return {
            "generator": self.generator.engine.weights(),
            "discriminator": self.discriminator.engine.weights(),
            "generator_ema": self.average.network.state_dict(),
            "generator_optimizer": self.generator.engine.optimizer_state(),
            "discriminator_optimizer": self.discriminator.engine.optimizer_state(),
            "history": {
                f"{player.role}/{name}": value
                for player in self.players
                if player.history is not None
                for name, value in player.history.state().items()
            },
            "counters": {
                f"{player.role}/{name}": value for player in self.players for name, value in player.counters.items()
            },
        }

    def description(self, runtime: Runtime) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON (see `Description`). Every rank calls it."""
        return {
            "step": self.progress.step,
            "position": self.progress.position,
            "images": self.progress.position,
            "best": self.progress.best,
            "accepted": sorted(self.progress.accepted),
            "substitutions": self.progress.substitutions.to_json(),
            "data": {"fingerprint": self.index.fingerprint, "samples": len(self.index)},
            "classes": class_description(self.config, self.index),
            "vocabulary": list(self.index.vocabulary) if self.index.vocabulary else None,
            "world_size": runtime.world_size,
            "statistics": {player.role: player.statistics.totals(runtime) for player in self.players},
            "diagnosis": self.progress.diagnosis.model_dump(mode="json"),
            "config": self.config.model_dump(mode="json"),
            "versions": {"distgan": distgan.__version__, "torch": torch.__version__},
        }

    def load(self, path: Path, accept: frozenset[str]) -> Description:
        """Become what a checkpoint holds. Returns its description.

        Raises:
            UserError: the checkpoint is of another data set, seed, statistics batch or architecture, or damaged.
        """
        description = load_description(path)
        self._check_fits(path, description, accept)
        weights = {player.role: read_network(path, player.role, player.network) for player in self.players}
        average = read_network(path, "generator_ema", self.average.network)
        files = checkpoint.load_files(path, ["generator_optimizer", "discriminator_optimizer", "history", "counters"])
        # All of it is checked before ranks act together on any.
        check_numbers(path, files)
        for player in self.players:
            check_optimizer(path, player, files[f"{player.role}_optimizer"])
            _check_history(path, player, files["history"])
            _check_counters(path, player, files["counters"])
        self.progress.step = description.step
        self.progress.position = description.position
        grow(self)  # before the moments, which are those of the parameters that take part there
        self.average.network.load_state_dict(average)
        for player in self.players:
            player.statistics.carry(description.statistics.get(player.role, {}))
            player.engine.load_weights(weights[player.role])
            player.engine.load_optimizer_state(files[f"{player.role}_optimizer"])
            _load_history(player, files["history"])
            for name, counter in player.counters.items():
                counter.copy_(files["counters"][f"{player.role}/{name}"])
        self.progress.accepted = frozenset(description.accepted) | accept
        self.progress.best = description.best.model_dump() if description.best else None
        self.progress.diagnosis = description.diagnosis
        with blaming(path / "state.json"):
            self.progress.substitutions = Substitutions.from_json(description.substitutions, len(self.index))
        return description

    def _check_fits(self, path: Path, description: Description, accept: frozenset[str]) -> None:
        then, now = parse_config(description.config, source=f"{path}/state.json"), self.config
        follows = schedule.position_after(then, description.step)
        if description.position != follows and "batch" not in description.accepted:
            raise UserError(
                f"{path}/state.json: position {description.position} at step {description.step}, where its config has "
                f"position {follows}; the file was changed, take another checkpoint"
            )
        found = description.data.fingerprint
        if found != self.index.fingerprint and "data" not in accept:
            raise UserError(
                f"{path}: saved from data with fingerprint {found[:12]}, but data.path has "
                f"{self.index.fingerprint[:12]}; restore the data, start another run_dir, or continue on "
                "the new data with --accept data"
            )
        if tuple(description.vocabulary or ()) != (self.index.vocabulary or ()):
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
                f"{images[1][0]} to {images[1][1]} (batch_size, critic_steps, warm_start, growth), and `distgan trace` "
                "would no longer tell which samples a step had; restore them (accumulation is free to change), or use "
                "--accept batch"
            )
        batches = [schedule.micro_batch(config, description.position) for config in (then, now)]
        if batches[0] != batches[1] and now.uses_batch_statistics and "statistics" not in accept:
            raise UserError(
                f"{path}: its batch statistics were over {batches[0]} samples (batch_size / accumulation), "
                f"but now they would be over {batches[1]}, which changes the objective; restore the two, or use "
                "--accept statistics"
            )
        for role in ("generator", "discriminator"):
            sizes = [getattr(config, role).reference_size for config in (then, now)]
            if sizes[0] != sizes[1] and None not in sizes:
                raise UserError(
                    f"{path}: {role}.reference_size was {sizes[0]}, but is {sizes[1]} now (where it is not given, it "
                    f"is batch_size / accumulation), and a reference batch cannot change; set "
                    f"{role}.reference_size={sizes[0]}"
                )


def run_shape(config: Config, index: Index) -> SampleShape:
    """What the samples of a run are to its networks."""
    return sample_shape(config.data, num_classes=index.num_classes, vocabulary=len(index.vocabulary or ()))


def class_description(config: Config, index: Index) -> dict[str, Any] | None:
    """Names and counts of the classes a conditional run uses, None for an unconditional one."""
    if not config.data.labels:
        return None
    return {"names": list(index.class_names) if index.class_names else None, "counts": class_counts(index)}


def class_counts(index: Index) -> list[int]:
    """Samples of each class."""
    counts: list[int] = np.bincount(index.labels, minlength=index.num_classes).tolist()
    return counts


def _own(player: Player, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a file's tensors that are a player's."""
    prefix = f"{player.role}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_history(path: Path, player: Player, saved: Mapping[str, Tensor]) -> None:
    """Raise UserError unless an average over time is whole, or none was kept."""
    own = _own(player, saved)
    if player.history is None or not own:
        return
    for name, tensor in player.history.state().items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"{path}/history.safetensors: {player.role}/{name} is missing or of another shape; "
                "take another checkpoint, or leave objective.historical_averaging out"
            )


def _load_history(player: Player, saved: Mapping[str, Tensor]) -> None:
    """Take a saved average over time, or begin one at the weights now if none was kept then."""
    own = _own(player, saved)
    if player.history is None:
        return
    if not own:
        with player.runtime.whole(player.network):
            player.history.restart()
        return
    for name, tensor in player.history.state().items():
        tensor.copy_(own[name])


def _check_counters(path: Path, player: Player, saved: Mapping[str, Tensor]) -> None:
    """Raise UserError unless all of a player's counters are numbers."""
    for name in player.counters:
        counter = saved.get(f"{player.role}/{name}")
        if counter is None or counter.dim() or not counter.isfinite():
            raise UserError(f"{path}/counters.safetensors: {player.role}/{name} is no number; take another checkpoint")


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
        like = player.skipped if quantity == "step" else parameters[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise UserError(
                f"{file}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {like.dtype} of shape "
                f"{tuple(like.shape)}; the checkpoint is damaged or of another architecture"
            )
