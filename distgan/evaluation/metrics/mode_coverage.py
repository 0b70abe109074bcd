"""Mode coverage: the number of modes of a mixture that generated points cover, and the share of points in a mode.

Lin, Khetan, Fanti, Oh, "PacGAN: The power of two samples in generative adversarial networks", NeurIPS 2018, section
4.1 (after Srivastava et al., VEEGAN, 2017): a point belongs to its nearest mode, and is of high quality within three
standard deviations of it. A mode is covered if it has at least one point of high quality. The modes' centers and width
are estimated from the real points, whose labels name the mode that each was drawn from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.moments import all_reduce

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

DEVIATIONS = 3.0
"""Largest distance of a high-quality point from its mode, in standard deviations."""


class Modes(NamedTuple):
    """The modes of a mixture of equally wide, round normal distributions, float64."""

    centers: Tensor
    """Shape (k, d)."""
    deviation: Tensor
    """Standard deviation along each axis, a scalar."""


class Coverage(NamedTuple):
    """Mode coverage of points, as scalars: int64, float64."""

    covered: Tensor
    """Number of modes with at least one point of high quality."""
    high_quality: Tensor
    """The share of points of high quality."""


class ModeCoverage(Metric):
    """Update with points; compute a `Coverage`."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    centers: Tensor
    deviation: Tensor
    hits: Tensor
    total: Tensor

    def __init__(self, modes: Modes, **settings: Any) -> None:
        """settings: those of `torchmetrics.Metric`."""
        super().__init__(**{"dist_sync_fn": all_reduce, **settings})
        self.register_buffer("centers", modes.centers, persistent=False)
        self.register_buffer("deviation", modes.deviation, persistent=False)
        self.add_state("hits", torch.zeros(len(modes.centers), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, points: Tensor) -> None:
        """Add points, shape (n, d), any real dtype. A point that is not finite belongs to no mode."""
        distances = (points.detach().double()[:, None] - self.centers).square().sum(2).sqrt()
        nearest, mode = distances.min(1)
        self.hits += torch.bincount(mode[nearest <= DEVIATIONS * self.deviation], minlength=len(self.hits))
        self.total += len(points)

    def compute(self) -> Coverage:
        """Compute the coverage by all points of all ranks."""
        return Coverage((self.hits > 0).sum(), self.hits.sum() / self.total.double())


class MixtureMoments(Metric):
    """Update with real points and the modes that they were drawn from; compute the `Modes`."""

    is_differentiable = False
    full_state_update = False
    counts: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(self, num_modes: int, dimensions: int, **settings: Any) -> None:
        """settings: those of `torchmetrics.Metric`."""
        super().__init__(**{"dist_sync_fn": all_reduce, **settings})
        for name, shape in (("counts", (num_modes,)), ("sums", (num_modes, dimensions)), ("squares", (num_modes,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, points: Tensor, labels: Tensor) -> None:
        """Add points, shape (n, d), and the numbers of their modes, int64 of shape (n,)."""
        points = points.detach().double()
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.sums.index_add_(0, labels, points)
        self.squares.index_add_(0, labels, points.square().sum(1))

    def compute(self) -> Modes:
        """Compute the means of the modes with points, and the standard deviation pooled over modes and axes.

        Raises UserError if no mode has two points.
        """
        present = self.counts > 0
        counts, sums = self.counts[present], self.sums[present]
        freedom = sums.shape[1] * (counts.sum() - len(counts))
        if freedom <= 0:
            raise UserError(
                "modes: found no mode with two real points, expected at least one; label the points with their modes"
            )
        centers = sums / counts[:, None]
        scatter = (self.squares[present] - (centers * sums).sum(1)).sum()
        return Modes(centers, (scatter.clamp(min=0) / freedom).sqrt())


class RealModes(MixtureMoments):
    """The `Modes` that the labeled real points were drawn from."""

    cache_name = "real-modes"
    takes = ("samples", "labels")

    def __init__(self, context: EvaluationContext) -> None:
        """Prepare the sums. Raises UserError if the points have no labels."""
        data, num_modes = context.config.data, context.index.num_classes
        if not num_modes:
            raise UserError(
                f"evaluation.metrics: modes needs labels that name each point's mode, found none in data.path = "
                f"{data.path}; use a mixture such as builtin:ring, or set evaluation.every=0",
                everywhere=True,
            )
        super().__init__(num_modes, data.dimensions)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the `centers` and the `deviation`. Raises UserError if no mode has two points."""
        return super().compute()._asdict()


class CoveredModes(ModeCoverage):
    """Number of modes covered by the points of an evaluation, with `high_quality`: `SuiteMetric`."""

    kinds = ("points",)
    real_statistic = RealModes

    def __init__(self, reals: Mapping[str, Tensor]) -> None:
        super().__init__(Modes(reals["centers"], reals["deviation"]))

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the number of modes covered and `high_quality`."""
        coverage = super().compute()
        return {"": coverage.covered, "high_quality": coverage.high_quality}
