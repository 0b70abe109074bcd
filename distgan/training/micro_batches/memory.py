"""Micro-batches and memory: which numbers of micro-batches an update can have, and the error if one does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distgan import schedule
from distgan.config import Config
from distgan.errors import MicroBatchMemoryError, UserError, counted, is_out_of_memory
from distgan.players.finite_differences import finite_difference_penalties

AUTO = "training.gradient_accumulation_steps = auto"
LIMITING = ("batch_size", "generator_batch_size", "mixed_precision", "activation_checkpointing")
"""Keys of `training` on which the number of micro-batches that fit depends."""
SMALLER = "lower the batch size, or set training.mixed_precision=bf16"


def check_accumulation(config: Config, world_size: int) -> None:
    """Raise UserError if the number of micro-batches is `auto`, and the objective depends on it."""
    if config.training.gradient_accumulation_steps != "auto":
        return
    if config.growth is not None:
        raise UserError(f"{AUTO}: the memory of later levels (growth) cannot be found at the start; set a number")
    for role, network in (("generator", config.generator), ("discriminator", config.discriminator)):
        keys = [*schedule.statistics_sizes(config, 0, world_size, role)]
        keys += [f"{role}.normalization"] if network.facts.has_reference else []
        if keys:
            raise UserError(
                f"{AUTO}: {keys[0]} takes statistics of a micro-batch, so that the objective would depend on the "
                "memory of the machine; set a number"
            )


def accumulations(config: Config, world_size: int) -> list[int]:
    """Return the numbers of micro-batches that divide the batches of both players among the ranks, in order."""
    training = config.training
    common = math.gcd(training.batch_size, training.generator_batch_size or training.batch_size) // world_size
    strides = [penalty.stride for penalty in finite_difference_penalties(config).values()]
    share = training.batch_size // world_size
    return [
        number
        for number in range(1, common + 1)
        if not common % number and not any(share // number % stride for stride in strides)
    ]


def with_accumulation(config: Config, found: int) -> Config:
    """Return the config with the number of micro-batches that was found for `auto`."""
    return config.model_copy(update={"training": config.training.with_accumulation(found)})


def next_accumulation(numbers: Sequence[int], failed: int) -> int:
    """Return the smallest of the numbers of micro-batches that at least halves those of `failed`, or the last one."""
    return next((number for number in numbers if number >= 2 * failed), numbers[-1])


def exhausted_settings(config: Config, world_size: int) -> dict[str, Any]:
    """Return the number of micro-batches with the settings for which it was found, for `Status.exhausted`."""
    training = config.training.model_dump(mode="json", include={*LIMITING})
    return {"micro_batches": config.training.accumulation, "world_size": world_size, **training}


def failed_accumulation(config: Config, world_size: int, exhausted: Mapping[str, Any] | None) -> int:
    """Return the number of micro-batches with which memory ran out, if that was with these settings; else 0."""
    if exhausted is None:
        return 0
    found: int = exhausted["micro_batches"]
    return found if exhausted == exhausted_settings(with_accumulation(config, found), world_size) else 0


@contextmanager
def batch_memory(config: Config, world_size: int) -> Iterator[None]:
    """Context manager that turns an out-of-memory error in an update into a UserError that names the batch-size keys.

    If the run found its number of micro-batches itself and can take more, that is a `MicroBatchMemoryError`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise _memory_error(config, world_size, said) from None


def _memory_error(config: Config, world_size: int, said: str) -> UserError:
    training = config.training
    if training.gradient_accumulation_steps == "auto":
        numbers = accumulations(config, world_size)
        if training.accumulation < numbers[-1]:
            following = counted(next_accumulation(numbers, training.accumulation), "micro-batch", "micro-batches")
            return MicroBatchMemoryError(
                f"out of memory: {AUTO}, with {described(config, world_size)}: {said}; start again: the next start "
                f"takes {following}",
                exhausted_settings(config, world_size),
            )
    grown = config.growth.batch_sizes if config.growth is not None else {}
    keys = [
        f"training.batch_size = {training.batch_size}",
        f"training.gradient_accumulation_steps = {training.accumulation}",
    ]
    keys += [f"growth.batch_sizes = {grown}"] if grown else []
    if training.generator_batch_size is not None:
        keys.insert(1, f"training.generator_batch_size = {training.generator_batch_size}")
    largest = max(schedule.largest_batch(config), schedule.largest_generator_batch(config))
    share = largest // training.accumulation // world_size
    return UserError(
        f"{', '.join(keys)}: up to {share} samples per process and micro-batch: not enough memory: {said}; lower the "
        "batch size, raise training.gradient_accumulation_steps, or set training.mixed_precision=bf16"
    )


def described(config: Config, world_size: int) -> str:
    """Return the number of micro-batches and their samples, such as `2 micro-batches of 8 samples per process`."""
    micro_batches = counted(config.training.accumulation, "micro-batch", "micro-batches")
    return f"{micro_batches} of {counted(config.micro_batch // world_size, 'sample')} per process"
