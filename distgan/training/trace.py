"""Samples of each rank at each step, computed without training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distgan import schedule
from distgan.checkpoint.contents import Description, load_description
from distgan.checkpoint.directory import directory_name, newest_step
from distgan.checkpoint.downloads import fetch_state
from distgan.config import Config
from distgan.data import order as orders
from distgan.data.index.loading import load_index
from distgan.errors import UserError
from distgan.randomness import branch_seed
from distgan.training.micro_batches.memory import with_accumulation
from distgan.training.setup import validate_run

MAX_STEPS = 2**40


def trace(config: Config, first: int, last: int, world_size: int = 1) -> Iterator[dict[str, Any]]:
    """Yield one record per sample for steps `first` to `last` - 1, by player, update, micro-batch and rank.

    `update` counts the updates of the record's player. The generator has records only if it draws its own reals.

    The trace ignores replacements: a sample that training found unreadable appears under its original index. If the run
    folder has a checkpoint, its rollbacks count, because they change the order of the data, and so does the number of
    micro-batches that it found on as many ranks (`training.gradient_accumulation_steps: auto`), which decides what rank
    gets a sample.

    Raises:
        UserError: the steps or the world size are out of range, or the batch does not divide among the ranks.
    """
    if not 0 <= first < last < MAX_STEPS:
        raise UserError(f"--steps {first}:{last}: expected A:B with 0 <= A < B < 2**40, such as 0:10")
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: expected a number of ranks from 1")
    index = load_index(config.data.path, config.data.cache_dir)
    validate_run(config, index, world_size)
    saved = _saved(config)
    rollbacks = saved.rollbacks if saved is not None and saved.config.get("seed") == config.seed else []
    if saved is not None and saved.accumulation is not None and saved.world_size == world_size:
        config = with_accumulation(config, saved.accumulation)
    seeds = [branch_seed(config.seed, count) for count in range(len(rollbacks) + 1)]
    sequences = [orders.make_order(config.data, seed, index) for seed in seeds]
    for step in range(first, last):
        order = sequences[sum(start <= step for start in rollbacks)]
        used = schedule.used_after(config, step)
        updates = list(schedule.discriminator_updates(config, step, used))
        drawn = [("discriminator", update.index, update.start, update.micro_batch) for update in updates]
        if config.generator_draws_reals:
            end = updates[-1].start + updates[-1].batch_size
            drawn.append(("generator", step, end, schedule.generator_micro_batch(config, used.images)))
        for player, number, first_position, micro_batch in drawn:
            batch = micro_batch * config.training.accumulation
            for start in range(first_position, first_position + batch, micro_batch):
                shares = orders.assign(order, np.arange(start, start + micro_batch), world_size)
                for rank, positions in enumerate(shares):
                    for record in orders.trace(index, order, positions):
                        yield {"step": step, "player": player, "update": number, "rank": rank, **record}


def _saved(config: Config) -> Description | None:
    """Return the description of the newest checkpoint of the run of this config, if there is one."""
    if config.run_url is not None:
        with tempfile.TemporaryDirectory() as folder:
            return load_description(Path(folder)) if fetch_state(config.run_url, Path(folder)) else None
    checkpoints = config.run_folder / "checkpoints"
    newest = newest_step(checkpoints)
    return None if newest is None else load_description(checkpoints / directory_name(newest))
