"""Find the number of micro-batches of `training.gradient_accumulation_steps: auto`.

The smallest number whose updates fit into the memory of all ranks is found by trials: updates of both players on blank
samples, in a training state that is dropped afterward. So a run with the same number in its config gives bitwise the
same weights.
"""

from __future__ import annotations

import bisect
import gc
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distgan import schedule
from distgan.checkpoint.contents import Description
from distgan.config import Config
from distgan.data.index.table import Index
from distgan.distributed.runtime import Runtime, ranks_per_gpu
from distgan.errors import UserError, is_out_of_memory
from distgan.networks.layers.spectral_norm import power_iteration_vectors
from distgan.networks.moving import foreign_moving_buffers
from distgan.players.player import Player
from distgan.players.samples import blank_batch
from distgan.runs.remote import RemoteRun
from distgan.training.micro_batches.memory import (
    AUTO,
    SMALLER,
    accumulations,
    described,
    failed_accumulation,
    next_accumulation,
    with_accumulation,
)
from distgan.training.resume import peek
from distgan.training.setup import assemble
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")

HEADROOM = 0.08
"""Fraction of the free memory that trials leave: for fragments, evaluations' leftovers, and libraries' buffers."""


def settle_accumulation(
    config: Config,
    index: Index,
    runtime: Runtime,
    resume: str,
    accept: frozenset[str],
    exhausted: dict[str, Any] | None,
    remote: RemoteRun | None = None,
) -> Config:
    """Return the config with its number of micro-batches, if that is `auto`. Collective: call on every rank.

    A resume on as many ranks takes the number of the checkpoint, so that it is bitwise.

    Args:
        resume, accept: see `train`.
        remote: the run in its object store, if it is in one.
        exhausted: see `Status.exhausted`.

    Raises:
        UserError: the networks depend on the number, the checkpoint cannot be resumed, or even the smallest micro-batch
            does not fit.
    """
    if config.training.gradient_accumulation_steps != "auto":
        return config
    then = peek(config, runtime, resume, remote)
    numbers, saved = accumulations(config, runtime.world_size), _saved(config, runtime, then[1] if then else None)
    failed = failed_accumulation(config, runtime.world_size, exhausted)
    if saved in numbers and saved > failed:
        found, how = saved, "as in the checkpoint"
    elif failed:
        found, how = next_accumulation(numbers, failed), f"memory ran out with {failed}"
    else:
        found, how = _find(config, index, runtime, numbers, then, accept), "the largest that fit"
        if runtime.device.type != "cuda":
            how = f"the largest that could be allocated; a {runtime.device.type} has no limit that ranks could share"
    settled = with_accumulation(config, found)
    if runtime.is_main:
        logger.info("%s: %s (%s)", AUTO, described(settled, runtime.world_size), how)
    return settled


def _saved(config: Config, runtime: Runtime, then: Description | None) -> int:
    """Return the number of the checkpoint to resume from, if it is of the same batches on as many ranks; else 0."""
    if then is None or then.world_size != runtime.world_size:
        return 0
    before, now = then.config.get("training", {}), config.training.model_dump(mode="json")
    same = ("gradient_accumulation_steps", "batch_size", "generator_batch_size")
    return then.accumulation or 0 if all(before.get(key) == now[key] for key in same) else 0


def _find(
    config: Config,
    index: Index,
    runtime: Runtime,
    numbers: list[int],
    then: tuple[Path, Description] | None,
    accept: frozenset[str],
) -> int:
    """Return the smallest of the numbers with which updates fit. Collective: call on every rank."""
    untried = [then] if then is not None else []

    def check(state: TrainingState) -> None:
        # At the first trial, because all of them take minutes.
        if untried:
            with runtime.raise_on_all_ranks():
                # Nothing takes statistics of a micro-batch; see `check_accumulation`.
                state.check_resume(*untried.pop(), config, accept | {"statistics"})

    def fits(number: int) -> bool:
        return _fits(config, index, runtime, number, numbers[-1], check)

    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _equal_limit(runtime), _without_warnings():
        if fits(numbers[0]):
            return numbers[0]
        place = bisect.bisect_left(numbers, True, lo=1, key=fits)
    if place == len(numbers):
        smallest = described(with_accumulation(config, numbers[-1]), runtime.world_size)
        raise UserError(f"{AUTO}: not enough memory even for {smallest}; {SMALLER}", everywhere=True)
    return numbers[place]


def _fits(
    config: Config, index: Index, runtime: Runtime, number: int, most: int, check: Callable[[TrainingState], None]
) -> bool:
    """Return True if all ranks have the memory for updates in `number` micro-batches. Collective: call on every rank.

    Smallest updates come first: they allocate gradients and moments. The passes that follow have no collective, except
    for those of sharded weights and of the networks, so that a rank that alone runs out of memory keeps none waiting.

    Args:
        most: largest number of micro-batches, of the smallest ones.
        check: raises UserError on all ranks if the training state cannot be that of the run.
    """
    training = config.training
    batches = {key: size // most for key in ("batch_size", "generator_batch_size") if (size := getattr(training, key))}
    smallest = config.model_copy(update={"training": training.model_copy(update=batches)})
    state = assemble(smallest, index, runtime)
    _refuse_moving(state)
    check(state)
    before = _random_states(runtime)
    stages = (most, Player.update), (number, _accumulate), (number, Player.update)
    try:
        enough = all(not any(runtime.gather_objects(_runs_out(state, config, count, work))) for count, work in stages)
    finally:
        for player in state.players:
            player.engine.close()
        del state, player
        gc.collect()
        if training.compile:
            torch.compiler.reset()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
    if not all(map(torch.equal, before, _random_states(runtime))):
        raise UserError(
            f"{AUTO}: a network draws from torch's random number generator, as dropout does, so that the objective "
            "would depend on the memory of the machine; set a number",
            everywhere=True,
        )
    return enough


def _runs_out(state: TrainingState, config: Config, number: int, work: Callable[..., object]) -> bool:
    """Return True if memory runs out in updates of both players with micro-batches of a `number`-th of the batch.

    They are those before the first image and at the end of the run, because weights of schedules may begin at 0; with
    all lazy penalties due, and with none, when reals and fakes may go through the discriminator in one pass.
    """
    runtime = state.generator.runtime
    players = (
        (state.discriminator, config.discriminator.optimizer, schedule.largest_batch(config)),
        (state.generator, config.generator.optimizer, schedule.largest_generator_batch(config)),
    )
    try:
        for (player, optimizer, batch), images, update in itertools.product(players, (0, state.length), (0, 1)):
            share = batch // number // runtime.world_size
            blank = blank_batch(share, config, state.shape, runtime.device)
            settings = schedule.optimizer_settings(optimizer, 0, images, state.length, None)
            work(player, [blank], (images, update), settings)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


def _accumulate(player: Player, batches: list[object], arguments: tuple[object, ...], _: object) -> None:
    """Run the passes of micro-batches that are not the last of an update: their gradients stay on their rank."""
    with player.passing(arguments):
        for batch in batches:
            with player.engine.micro_batch(last=False):
                loss, _values = player.engine.module(batch, *arguments)
                player.engine.backward(loss)


def _refuse_moving(state: TrainingState) -> None:
    """Raise UserError if a forward pass changes what a later one computes, as spectral norm's power iteration does."""
    for player in state.players:
        if power_iteration_vectors(player.network) or foreign_moving_buffers(player.network):
            raise UserError(
                f"{AUTO}: each forward pass changes buffers of the {player.role}, as spectral norm does, so that the "
                "objective would depend on the memory of the machine; set a number",
                everywhere=True,
            )


def _random_states(runtime: Runtime) -> list[torch.Tensor]:
    """Return the states of torch's default random number generators, of the CPU and of this rank's device."""
    on_device = [torch.cuda.get_rng_state(runtime.device)] if runtime.device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context manager that drops warnings: the networks of each trial give those that the run's own give after it."""

    def is_no_warning(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING

    logger.addFilter(is_no_warning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(is_no_warning)


@contextmanager
def _equal_limit(runtime: Runtime) -> Iterator[None]:
    """Context manager that limits all ranks to the memory of the one with the least, less `HEADROOM`.

    Then ranks that do the same run out at the same place, and none waits for another. Only CUDA devices have limits.
    """
    if runtime.device.type != "cuda":
        yield
        return
    free, total = torch.cuda.mem_get_info(runtime.device)
    own = torch.cuda.memory_reserved(runtime.device)
    usual = torch.cuda.get_per_process_memory_fraction(runtime.device)
    least = min(runtime.gather_objects((free // ranks_per_gpu() + own) / total))
    torch.cuda.set_per_process_memory_fraction(min(usual, (1 - HEADROOM) * least), runtime.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(usual, runtime.device)
