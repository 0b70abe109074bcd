"""What runs in every step makes no tensor from a list: on a GPU the host would wait for it to be copied there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from distgan import randomness
from distgan.data.kinds import posterior
from distgan.inference.latents import ROWS, LatentPrefetcher, LatentSource
from distgan.losses.dinov2 import Teacher
from distgan.networks.layers.resampling import Downsample, Upsample
from tests.unit.test_reconstruction import batch, config, players

POSITIONS = torch.arange(3)
AHEAD = LatentPrefetcher(LatentSource(config().generator, 0, class_counts=None), "latents", ROWS, ROWS, 1, ROWS)
FIRSTS = itertools.count(0, ROWS)


class Refusal(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), "made from a list"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "work",
    [
        lambda: randomness.uniform(1, "noise", POSITIONS, (2, 3)),
        lambda: randomness.normal(1, "noise", POSITIONS, (5,)),
        lambda: randomness.integers(1, "noise", POSITIONS, 10),
        lambda: randomness.addresses(torch.zeros(3, 2)),
        lambda: Upsample()(torch.zeros(1, 2, 4, 4)),
        lambda: Downsample()(torch.zeros(1, 2, 4, 4)),
        lambda: posterior.normalize(torch.zeros(1, 2, 4, 4), [0.5, 1.0], [2.0, 1.0]),
        lambda: Teacher.inputs(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
        lambda: players(config())[0](batch(), 0)[0],
        lambda: players(config())[1](batch(), 0, 0)[0],
        lambda: AHEAD.take(next(FIRSTS))[1],
    ],
)
def test_nothing_is_made_from_lists(work: Callable[[], torch.Tensor]) -> None:
    with Refusal():
        work()
