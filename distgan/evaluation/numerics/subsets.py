"""Addressed random subsets of samples: functions of a purpose, the same on every rank."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distgan.data.order import permute
from distgan.randomness import derive_key


def draw_subsets(population: int, size: int, purpose: str, count: int, seed: int = 0) -> Tensor:
    """Draw `count` addressed subsets of `size` indices in [0, population), each without replacement: (count, size)."""
    keys = np.array([derive_key(seed, f"{purpose}/{number}") for number in range(count)], np.uint64)
    places = np.tile(np.arange(size), count)
    return torch.from_numpy(permute(places, population, keys.repeat(size)).reshape(count, size))


def choose_reals(count: int, most: int) -> Tensor:
    """Return an addressed choice of `most` or all of `count` indices: int64, increasing. A larger one contains it."""
    return torch.from_numpy(permute(np.arange(min(count, most)), count, derive_key(0, "reals"))).sort().values
