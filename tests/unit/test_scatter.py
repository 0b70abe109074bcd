"""Points as a picture: where dots lie, and what is drawn of strange points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distgan.monitoring.scatter import SIDE, _axes, _round_up, scatter


def inked(points: Tensor, limit: float) -> Tensor:
    """Rows and columns of the pixels that differ from the empty axes, shape (k, 2)."""
    paper = torch.from_numpy(np.array(_axes(limit))).permute(2, 0, 1)
    return (scatter(points) != paper).any(0).nonzero()


def test_a_point_is_a_dot_where_it_lies() -> None:
    """The corners of the square from -1 to 1, and a point inside it; x to the right, y upwards."""
    for x, y in ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)):
        pixels = inked(torch.tensor([[x, y]]), 1.0)
        assert len(pixels) == 9
        assert pixels.float().mean(0).tolist() == [1 if y > 0 else SIDE - 2, SIDE - 2 if x > 0 else 1]
    both = inked(torch.tensor([[0.5, -0.25], [1.0, 0.0]]), 1.0)
    left = both[both[:, 1] < SIDE - 5].float().mean(0)
    assert left.tolist() == pytest.approx([(1.25 / 2) * (SIDE - 3) + 1, (1.5 / 2) * (SIDE - 3) + 1], abs=0.5)


def test_dots_are_darker_the_more_lie_together() -> None:
    shades = [scatter(torch.full((count, 2), 0.5)).long().sum().item() for count in (1, 2, 5, 100)]
    assert shades == sorted(shades, reverse=True)
    assert len(set(shades)) == 4


@pytest.mark.parametrize(
    ("value", "limit"),
    [(0, 1), (0.3, 0.5), (0.5, 0.5), (1, 1), (1.01, 2), (4.2, 5), (5.1, 10), (123, 200), (7e-9, 1e-8)],
)
def test_the_scale_is_round(value: float, limit: float) -> None:
    assert math.isclose(_round_up(value), limit)


def test_strange_points() -> None:
    empty = scatter(torch.zeros(0, 2))
    assert empty.shape == (3, SIDE, SIDE)
    assert empty.dtype == torch.uint8
    infinite = torch.tensor([[float("nan"), 0.0], [0.0, float("inf")], [0.5, 0.5]])
    assert torch.equal(scatter(infinite), scatter(torch.tensor([[0.5, 0.5]])))
    assert torch.equal(scatter(torch.tensor([[0.3, 0.4, 9.0]])), scatter(torch.tensor([[0.3, 0.4]])))
    assert torch.equal(scatter(torch.tensor([[0.3]])), scatter(torch.tensor([[0.3, 0.0]])))
    for huge in (3e38, 1e-40):
        assert len(inked(torch.tensor([[huge, 0.0]]), _round_up(float(torch.tensor(huge))))) > 0
