"""Nearest neighbors and distances between the rows of two sets, in blocks and shared by the ranks.

Squared distances are |x|^2 + |y|^2 - 2 x.y in float64, rounded to float32. The rounding absorbs the error of the matrix
products, so that equal distances compare as equal. Distances below a millionth of the norm count as 0, so that copies
of a row are at distance 0.

The blocks do not depend on the number of ranks, and neither do the values. A rank holds one block of distances at a
time: 8 MB in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distgan.evaluation.numerics.feature_rows import FeatureRows, check_finite, row_blocks

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

_ROWS, _COLUMNS = 512, 2048
"""Shape of a block of distances."""
_ZERO = 1e-12
"""Largest ratio of a squared distance to the squared norm that counts as 0. The products' error is about 1e-15."""


class Block(NamedTuple):
    """Distances between some rows of two sets."""

    rows: slice
    """Rows of the first set."""
    columns: slice
    """Rows of the second set."""
    squared: Tensor
    """Squared distances, float32, of shape (rows, columns)."""


def blocks(first: Tensor, second: Tensor, runtime: Runtime) -> Iterator[Block]:
    """Yield the distances between this rank's rows of the first set and all rows of the second, in blocks.

    Rank r of W has the blocks of rows r, r + W, ...

    Args:
        first, second: shapes (n, d) and (m, d), any real dtype, the same on every rank.
    """
    for rows in row_blocks(len(first), _ROWS, runtime):
        x = first[rows].double()
        norms, ones = x.square().sum(1, keepdim=True), x.new_ones(len(x), 1)
        x = torch.cat((-2 * x, norms, ones), 1)  # one product then has all three terms
        for column in range(0, len(second), _COLUMNS):
            columns = slice(column, min(column + _COLUMNS, len(second)))
            y = second[columns].double()
            y = torch.cat((y, y.new_ones(len(y), 1), y.square().sum(1, keepdim=True)), 1)
            squared = (x @ y.T).float()
            yield Block(rows, columns, squared.mul_(squared > (_ZERO * norms).float()))


def kth_nearest(rows: Tensor, k: int, runtime: Runtime) -> Tensor:
    """Return the squared distance of each row to its k-th nearest other row. Collective: call on every rank.

    Args:
        rows: shape (n, d), n > k, the same on every rank.

    Returns:
        float32, shape (n,), the same on every rank.
    """
    nearest = torch.full((len(rows), k), torch.inf, device=rows.device)
    for mine, columns, squared in blocks(rows, rows, runtime):
        start = max(mine.start, columns.start)
        itself = torch.arange(start, max(start, min(mine.stop, columns.stop)), device=rows.device)
        squared[itself - mine.start, itself - columns.start] = torch.inf
        candidates = squared.topk(min(k, squared.shape[1]), largest=False).values
        nearest[mine] = torch.cat((nearest[mine], candidates), 1).topk(k, largest=False).values
    farthest = nearest.amax(1)
    return runtime.all_reduce_sum(farthest.where(farthest.isfinite(), 0.0))  # rows of other ranks are infinite


class NeighborMetric(FeatureRows):
    """Base of metrics that compare distances between generated and real features."""

    def __init__(
        self, reals: Tensor, neighbors: int, runtime: Runtime, name: str = "features", **settings: Any
    ) -> None:
        """Prepare the features.

        Args:
            reals: real features, shape (m, d).
            neighbors: k, less than m.
            name: name of the value in messages.
            settings: keyword arguments of `torchmetrics.Metric`.

        Raises:
            UserError: real features are not finite.
        """
        super().__init__(runtime, name, **settings)
        check_finite(reals, name, "real")
        self.reals, self.neighbors = reals, neighbors
        self._real_radii: Tensor | None = None

    def _sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return generated features in order of their numbers, real features, and the real radii, squared."""
        fakes = self.rows()
        reals = self.reals.to(fakes.device)
        if self._real_radii is None:  # the reals are the same in every evaluation
            self._real_radii = kth_nearest(reals, self.neighbors, self.runtime)
        return fakes, reals, self._real_radii.to(fakes.device)

    def _any_rank(self, found: Tensor) -> Tensor:
        """Return the logical or over ranks. Collective: call on every rank."""
        return self.runtime.all_reduce_sum(found.int()) > 0
