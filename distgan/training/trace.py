"""Samples of each rank at each step, computed without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from distgan import schedule
from distgan.config import Config
from distgan.data import order as orders
from distgan.data.index.loading import load_index
from distgan.errors import UserError
from distgan.training.setup import validate_run

MAX_STEPS = 2**40


def trace(config: Config, first: int, last: int, world_size: int = 1) -> Iterator[dict[str, Any]]:
    """Yield one record per sample for steps `first` to `last` - 1, by update, micro-batch and rank.

    The trace ignores replacements: a sample that training found unreadable appears under its original index.

    Raises:
        UserError: the steps or the world size are out of range, or the batch does not divide among the ranks.
    """
    if not 0 <= first < last < MAX_STEPS:
        raise UserError(f"--steps {first}:{last}: expected A:B with 0 <= A < B < 2**40, such as 0:10")
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: expected a number of ranks from 1")
    index = load_index(config.data.path, config.data.cache_dir)
    validate_run(config, index, world_size)
    order = orders.make_order(config.data, config.seed, index)
    for step in range(first, last):
        for update in schedule.discriminator_updates(config, step, schedule.position_after(config, step)):
            for start in range(update.start, update.start + update.batch_size, update.micro_batch):
                shares = order.assign(np.arange(start, start + update.micro_batch), world_size)
                for rank, positions in enumerate(shares):
                    for record in orders.trace(index, order, positions):
                        yield {"step": step, "update": update.index, "rank": rank, **record}
