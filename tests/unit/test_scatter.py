"""Points as a picture: where dots and axes lie, what the labels read, and what is drawn of strange points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distgan.monitoring.scatter import SIDE, scatter

MIDDLE = SIDE // 2
WHITE, AXIS = [255, 255, 255], [205, 205, 205]
ONCE = [138, 158, 198]
"""Half of white and half of the ink, (20, 60, 140); halves of a level to the even one."""


def dots(picture: Tensor) -> Tensor:
    """Rows and columns of the pixels with a tint, which paper, axes and labels have not, shape (k, 2)."""
    return (picture.long().amax(0) > picture.long().amin(0)).nonzero()


def written(picture: Tensor, half: slice) -> np.ndarray:
    """The text below the axis in some columns, cut out, in levels of gray."""
    gray = picture[0, MIDDLE + 1 :, half].numpy()
    rows, columns = np.nonzero(gray < 205)
    return gray[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def lettering(text: str) -> np.ndarray:
    """The same, as Pillow writes it on a paper of its own."""
    paper = Image.new("L", (100, 30), 255)
    ImageDraw.Draw(paper).text((10, 5), text, 0)
    return written(
        torch.from_numpy(np.pad(np.array(paper), ((MIDDLE + 1, 0), (0, 0)), constant_values=255))[None], slice(0, 100)
    )


def test_the_paper_is_white_with_an_axis_each_way_through_its_middle() -> None:
    empty = scatter(torch.zeros(0, 2))
    assert empty.shape == (3, SIDE, SIDE)
    assert empty.dtype == torch.uint8
    upper = empty.permute(1, 2, 0)[:MIDDLE]
    assert (upper[:, MIDDLE] == torch.tensor(AXIS)).all()
    assert (torch.cat([upper[:, :MIDDLE], upper[:, MIDDLE + 1 :]], 1) == torch.tensor(WHITE)).all()
    assert (empty.permute(1, 2, 0)[MIDDLE] == torch.tensor(AXIS)).all()
    assert len(dots(empty)) == 0


def test_a_point_is_a_dot_where_it_lies() -> None:
    """The corners of the square from -1 to 1, and a point inside it; x to the right, y upwards."""
    for x, y in ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)):
        picture = scatter(torch.tensor([[x, y]]))
        pixels = dots(picture)
        assert len(pixels) == 9
        assert pixels.float().mean(0).tolist() == [1 if y > 0 else SIDE - 2, SIDE - 2 if x > 0 else 1]
        assert (torch.tensor(ONCE) == picture[:, pixels[:, 0], pixels[:, 1]].T).all()
    both = dots(scatter(torch.tensor([[0.5, -0.25], [1.0, 0.0]])))
    left = both[both[:, 1] < SIDE - 5].float().mean(0)
    assert left.tolist() == pytest.approx([(1.25 / 2) * (SIDE - 3) + 1, (1.5 / 2) * (SIDE - 3) + 1], abs=0.5)


def test_dots_are_darker_the_more_lie_together() -> None:
    """n dots let through 1 / 2**n of the paper, until nothing is seen but the ink."""
    shades = []
    for count in (1, 2, 5, 100):
        picture = scatter(torch.full((count, 2), 0.5))
        row, column = dots(picture)[0].tolist()
        shades.append(picture[:, row, column].tolist())
    assert shades == [ONCE, [79, 109, 169], [27, 66, 144], [20, 60, 140]]


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (0.0, "1"), (0.3, "0.5"), (0.5, "0.5"), (1.0, "1"), (1.01, "2"), (4.2, "5"), (5.1, "10"), (123.0, "200"),
        (7e-9, "1e-08"), (3e38, "5e+38"), (1e-40, "1e-40"),
    ],
)  # fmt: skip
def test_the_scale_is_round(value: float, limit: str) -> None:
    """A point at (value, value) has the share value / limit of the way from the middle to the upper right corner."""
    picture = scatter(torch.tensor([[value, value]], dtype=torch.float64))
    share = value / float(limit)
    center = [(1 - share) / 2 * (SIDE - 3) + 1, (1 + share) / 2 * (SIDE - 3) + 1]
    assert dots(picture).float().mean(0).tolist() == pytest.approx(center, abs=0.5)
    np.testing.assert_array_equal(written(picture, slice(0, MIDDLE - 5)), lettering(f"-{limit}"))
    np.testing.assert_array_equal(written(picture, slice(MIDDLE + 5, SIDE)), lettering(limit))


def test_strange_points() -> None:
    infinite = torch.tensor([[float("nan"), 0.0], [0.0, float("inf")], [0.5, 0.5]])
    assert torch.equal(scatter(infinite), scatter(torch.tensor([[0.5, 0.5]])))
    assert torch.equal(scatter(torch.tensor([[0.3, 0.4, 9.0]])), scatter(torch.tensor([[0.3, 0.4]])))
    assert torch.equal(scatter(torch.tensor([[0.3]])), scatter(torch.tensor([[0.3, 0.0]])))
