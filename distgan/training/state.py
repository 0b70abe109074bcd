"""Training state of a run: what a checkpoint holds, and how to save and load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distgan import schedule
from distgan.autoencoders.decoding import LatentDecoder, with_decoder
from distgan.checkpoint.compatibility import (
    check_controller,
    check_counters,
    check_history,
    check_optimizer,
    own_tensors,
    validate_resume,
)
from distgan.checkpoint.contents import Description, load_description
from distgan.checkpoint.layout import read_layout, read_sets
from distgan.checkpoint.loading import Share, check_numbers, read_network
from distgan.config import Config, plain_values
from distgan.data.index.table import Index
from distgan.data.kinds.images import JPEG_DECODER
from distgan.data.replacements import Substitutions
from distgan.distributed.parts import Held, Stored, load_parts, local_part
from distgan.distributed.runtime import Runtime
from distgan.errors import blaming
from distgan.extensions import code_digests
from distgan.losses.augmentation.controller import AugmentationController
from distgan.monitoring.diagnosis import Diagnosis
from distgan.monitoring.divergence import Divergence
from distgan.networks.progressive import set_growth
from distgan.networks.shape import SampleShape, sample_shape
from distgan.players.player import Player
from distgan.players.samples import blank_batch
from distgan.randomness import branch_seed
from distgan.training.ema import EMAGenerator, Profiles
from distgan.version import __version__


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0
    position: int = 0
    """Stream position, the only state of the data stream."""
    images: int = 0
    """Number of real images that discriminator updates used."""
    best: dict[str, Any] | None = None
    accepted: frozenset[str] = frozenset()
    """Differences, from `contents.ACCEPTABLE`, that `--accept` has allowed in this run so far."""
    substitutions: Substitutions = field(default_factory=Substitutions)
    diagnosis: Diagnosis = field(default_factory=Diagnosis)
    divergence: Divergence = field(default_factory=Divergence)
    rollbacks: tuple[int, ...] = ()
    """Steps that the run went back to after a divergence, in order."""

    @property
    def used(self) -> schedule.Used:
        """Real samples used so far."""
        return schedule.Used(self.position, self.images)


@dataclass
class TrainingState:
    """Both players, the EMA generator and the counters of a run."""

    config: Config
    index: Index
    generator: Player
    discriminator: Player
    average: EMAGenerator
    profiles: Profiles
    progress: Progress
    growth: schedule.Growth | None
    """Level and fade of growing networks; None if the networks do not grow."""
    controller: AugmentationController | None = None
    """Holds the probability of the augmentation if that is adaptive, else None."""
    decoder: LatentDecoder | None = None
    """Decodes generated latents for metrics and pictures; None without one."""

    @property
    def players(self) -> tuple[Player, Player]:
        """Both players."""
        return self.generator, self.discriminator

    @property
    def seed(self) -> int:
        """Seed of all that training draws. Evaluations and sample grids keep the seed of the config."""
        return branch_seed(self.config.seed, len(self.progress.rollbacks))

    def set_rollbacks(self, steps: tuple[int, ...]) -> None:
        """Set the steps that the run went back to, and with their number the seed."""
        self.progress.rollbacks = steps
        for player in self.players:
            player.objective.seed = self.seed

    @property
    def is_complete(self) -> bool:
        """True if the run has its full length."""
        return schedule.is_over(self.config, self.progress.step, self.progress.images)

    @property
    def is_before_last_step(self) -> bool:
        """True if the next step gives the run its full length."""
        config, step, images = self.config, self.progress.step, self.progress.images
        more = schedule.critic_steps(config, step) * schedule.batch_size(config, images)
        return schedule.is_over(config, step + 1, images + more)

    @cached_property
    def length(self) -> int:
        """Number of images that the discriminator is trained on in the whole run."""
        return schedule.run_images(self.config)

    @property
    def shape(self) -> SampleShape:
        """Shape and kind of the samples, as networks see them."""
        return run_shape(self.config, self.index)

    @property
    def sampler(self) -> tuple[nn.Module, SampleShape]:
        """The EMA generator, with its decoder if there is one, and the shape of what it makes."""
        return with_decoder(self.average.network, self.shape, self.decoder)

    @property
    def teacher_hash(self) -> str | None:
        """Hash of the network of `objective.alignment`; None without one."""
        alignment = getattr(self.discriminator.objective, "alignment", None)
        return alignment.teacher.hash if alignment is not None else None

    def grow(self) -> None:
        """Set the networks to the growth level and fade of the images so far. Collective: call on every rank.

        The set of active parameters changes at the start and at the end of each fade. The players then update their
        parameter groups. Their optimizers reset their moments if `growth.reset_optimizers` is true.
        """
        before, now = self.growth, schedule.growth(self.config, self.progress.images)
        if self.config.growth is None or before is None or now is None or before == now:
            return
        set_growth((self.generator.network, self.discriminator.network, self.average.network), now)
        self.growth = now
        if (before.level, before.fading) == (now.level, now.fading):
            return
        if self.config.training.compile:
            torch.compiler.reset()  # torch.compile stops recompiling after the eighth variant of a network
        for player in self.players:
            player.follow_growth(keep_moments=not self.config.growth.reset_optimizers)
        self.warm_up_buckets()

    def warm_up_buckets(self) -> None:
        """Fix the order of gradient buckets (see `Player.warm_up_buckets`). Collective: call on every rank."""
        config, runtime, images = self.config, self.generator.runtime, self.progress.images
        if runtime.world_size > 1:
            shape = replace(self.shape, resolution=schedule.resolution(config, images))
            batches = schedule.micro_batch(config, images), schedule.generator_micro_batch(config, images)
            for player, batch in zip((self.discriminator, self.generator), batches, strict=True):
                share = batch // runtime.world_size
                blank = blank_batch(share, config, shape, runtime.device)
                # Update 1: nothing lazy is due in it.
                player.warm_up_buckets((blank, 0, 1))

    @property
    def _augmentation(self) -> dict[str, Tensor]:
        return self.controller.state() if self.controller is not None else {}

    def tensors(self) -> dict[str, dict[str, Held]]:
        """Return the sets of tensors of a checkpoint, with this rank's part of sharded tensors."""
        players, average = self.players, self.average.network.state_dict()
        histories = {player.role: player.history.state() for player in players if player.history is not None}
        counters = {player.role: player.counters for player in players} | {"controller": self._augmentation}
        return {
            "generator": self.generator.engine.weights(),
            "discriminator": self.discriminator.engine.weights(),
            "generator_ema": {name: local_part(tensor) for name, tensor in average.items()},
            "profiles": {name: local_part(tensor) for name, tensor in self.profiles.state().items()},
            "generator_optimizer": self.generator.engine.optimizer_state(),
            "discriminator_optimizer": self.discriminator.engine.optimizer_state(),
            "history": {f"{role}/{name}": tensor for role, of in histories.items() for name, tensor in of.items()},
            "counters": {f"{role}/{name}": tensor for role, of in counters.items() for name, tensor in of.items()},
        }

    def description(self, runtime: Runtime) -> dict[str, Any]:
        """Return the JSON part of a checkpoint (see `Description`). Collective: call on every rank."""
        return {
            "step": self.progress.step,
            "position": self.progress.position,
            "images": self.progress.images,
            "best": self.progress.best,
            "accepted": sorted(self.progress.accepted),
            "substitutions": self.progress.substitutions.to_json(),
            "data": {"fingerprint": self.index.fingerprint, "samples": len(self.index)},
            "classes": class_description(self.config, self.index),
            "vocabulary": list(self.index.vocabulary) if self.index.vocabulary else None,
            "latent_space": self.index.latents.space.model_dump(mode="json") if self.index.latents else None,
            "decoder": self.decoder.hash if self.decoder else None,
            "teacher": self.teacher_hash,
            "world_size": runtime.world_size,
            "accumulation": self.config.training.accumulation,
            "statistics": {player.role: player.statistics.totals(runtime) for player in self.players},
            "diagnosis": self.progress.diagnosis.model_dump(mode="json"),
            "divergence": self.progress.divergence.model_dump(mode="json"),
            "rollbacks": list(self.progress.rollbacks),
            "config": plain_values(self.config),
            "code": code_digests(self.config.code_paths),
            "versions": {"distgan": __version__, "torch": torch.__version__, "JPEG decoder": JPEG_DECODER},
        }

    def check_resume(
        self, path: Path, description: Description, config: Config, accept: frozenset[str]
    ) -> dict[str, dict[str, Stored]]:
        """Return the weights of both players in a checkpoint, by their roles, if the run can continue from it.

        Args:
            config: config of the run.

        Raises:
            UserError: see `load`.
        """
        runtime = self.generator.runtime
        validate_resume(path, description, config, self.index, runtime.world_size, accept,
                        self.decoder.hash if self.decoder else None, self.teacher_hash)  # fmt: skip
        classes, share = self.index.num_classes if config.data.labels else 0, Share(runtime.rank, runtime.world_size)
        return {
            player.role: read_network(path, player.role, player.network, num_classes=classes, share=share)
            for player in self.players
        }

    def load(self, path: Path, accept: frozenset[str]) -> Description:
        """Load a checkpoint into this state. Return its description.

        Raises:
            UserError: the checkpoint has another data set, seed, statistics batch or architecture, or is damaged.
        """
        # Ranks may see different files, and what follows is collective.
        runtime = self.generator.runtime
        share = Share(runtime.rank, runtime.world_size)
        with runtime.raise_on_all_ranks():
            description = load_description(path)
            weights = self.check_resume(path, description, self.config, accept)
            classes = self.index.num_classes if self.config.data.labels else 0
            average = read_network(path, "generator_ema", self.average.network, num_classes=classes, share=share)
            sets = read_sets(path, ["generator_optimizer", "discriminator_optimizer", "history", "counters"])
            kept = "profiles" in read_layout(path).sets
            sets |= read_sets(path, ["profiles"] if self.profiles and kept else [])
            check_numbers(path, sets, share)
            counters = {key: stored.whole() for key, stored in sets["counters"].items()}
            self.profiles.check(path, sets.get("profiles", {}))
            for player in self.players:
                check_optimizer(path, player, sets[f"{player.role}_optimizer"])
                check_history(path, player, sets["history"])
                check_counters(path, player, counters)
            if self.controller is not None:
                check_controller(path, counters)
        self.progress.step = description.step
        self.progress.position, self.progress.images = description.position, description.images
        self.grow()  # before the moments, which belong to the parameters that are active at that level
        load_parts(self.average.network.state_dict(), average)
        load_parts(self.profiles.state(), sets.get("profiles", {}))
        for player in self.players:
            player.statistics.carry(description.statistics.get(player.role, {}))
            player.engine.load_weights(weights[player.role])
            player.engine.load_optimizer_state(sets[f"{player.role}_optimizer"])
            _load_history(player, sets["history"])
            for name, counter in player.counters.items():
                counter.copy_(counters[f"{player.role}/{name}"])
        for name, tensor in self._augmentation.items():
            # A run that was not adaptive before starts at 0.
            tensor.copy_(counters.get(f"controller/{name}", torch.zeros(())))
        self.progress.accepted = frozenset(description.accepted) | accept
        self.progress.diagnosis = description.diagnosis
        self.set_rollbacks(tuple(description.rollbacks))
        if description.data.fingerprint == self.index.fingerprint:
            self.progress.best = description.best.model_dump() if description.best else None
            self.progress.divergence = description.divergence
            with blaming(path / "state.json"):
                self.progress.substitutions = Substitutions.from_json(description.substitutions, len(self.index))
        return description


def run_shape(config: Config, index: Index) -> SampleShape:
    """Return the shape and kind of a run's samples, as networks see them."""
    sizes = {"num_classes": index.num_classes, "vocabulary": len(index.vocabulary or ())}
    latents = index.latents
    return sample_shape(
        config.data, **sizes, shift=latents.shift if latents else (), scale=latents.scale if latents else ()
    )


def class_description(config: Config, index: Index) -> dict[str, Any] | None:
    """Return names and counts of the classes of a conditional run; None for an unconditional run."""
    if not config.data.labels:
        return None
    return {"names": list(index.class_names) if index.class_names else None, "counts": class_counts(index)}


def class_counts(index: Index) -> list[int]:
    """Return the number of samples per class. Of several sources, it is what about 2^36 draws would hold."""
    counts = np.bincount(index.labels, minlength=index.num_classes)
    if index.sources:
        total, shares = sum(source.weight for source in index.sources), np.zeros(len(counts))
        for source in index.sources:
            own = index.labels[source.samples.start : source.samples.stop]
            shares += np.bincount(own, minlength=len(counts)) * (source.weight / total / len(own))
        counts = np.where(counts, np.maximum(1, np.rint(shares * 2**36)), 0).astype(np.int64)
    return [int(count) for count in counts]


def _load_history(player: Player, saved: Mapping[str, Stored]) -> None:
    """Load a saved historical average, or restart it at the current weights if none was saved."""
    own = own_tensors(player, saved)
    if player.history is None:
        return
    if not own:
        with player.runtime.full_params(player.network):
            player.history.restart()
        return
    load_parts(player.history.state(), own)
