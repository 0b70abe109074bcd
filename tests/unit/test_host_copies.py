"""What runs in every step makes no tensor from a list: on a GPU the host would wait for it to be copied there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from distgan import randomness
from distgan.networks.layers.resampling import Downsample, Upsample

POSITIONS = torch.arange(3)


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
    ],
)
def test_nothing_is_made_from_lists(work: Callable[[], torch.Tensor]) -> None:
    with Refusal():
        work()
