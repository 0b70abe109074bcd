"""How many modes of a mixture the generated points cover, and how many of the points lie in one.

Lin, Khetan, Fanti, Oh, "PacGAN: The power of two samples in generative adversarial networks", NeurIPS 2018, section
4.1 (after Srivastava et al., VEEGAN, 2017): a point belongs to the mode it is nearest to, and is of high quality within
three standard deviations of that; a mode is covered when it has at least one point of high quality. Where the modes
are, and how wide, is taken from the real points, whose labels say which mode each was drawn from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.moments import all_reduce

DEVIATIONS = 3.0
"""How many standard deviations from its mode a point of high quality is at most."""


class Modes(NamedTuple):
    """The modes of a mixture of equally wide, round normal distributions, float64."""

    centres: Tensor
    """Shape (k, d)."""
    deviation: Tensor
    """Standard deviation along each axis, a scalar."""


class Coverage(NamedTuple):
    """Scalars: int64, float64."""

    covered: Tensor
    """Modes with at least one point of high quality."""
    high_quality: Tensor
    """The share of points of high quality."""


class ModeCoverage(Metric):
    """Update with points; compute a `Coverage`."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    centres: Tensor
    deviation: Tensor
    hits: Tensor
    total: Tensor

    def __init__(self, modes: Modes, **settings: Any) -> None:
        """settings: those of `torchmetrics.Metric`."""
        super().__init__(**{"dist_sync_fn": all_reduce, **settings})
        self.register_buffer("centres", modes.centres, persistent=False)
        self.register_buffer("deviation", modes.deviation, persistent=False)
        self.add_state("hits", torch.zeros(len(modes.centres), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, points: Tensor) -> None:
        """Add points: shape (n, d), any real dtype. One that is not finite is of no mode."""
        distances = (points.detach().double()[:, None] - self.centres).square().sum(2).sqrt()
        nearest, mode = distances.min(1)
        self.hits += torch.bincount(mode[nearest <= DEVIATIONS * self.deviation], minlength=len(self.hits))
        self.total += len(points)

    def compute(self) -> Coverage:
        """The coverage by all points of all ranks."""
        return Coverage((self.hits > 0).sum(), self.hits.sum() / self.total.double())


class MixtureMoments(Metric):
    """Update with real points and the modes they were drawn from; compute the `Modes`."""

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
        """Means of the modes that have points, and the standard deviation pooled over modes and axes.

        Raises UserError when no mode has two points.
        """
        present = self.counts > 0
        counts, sums = self.counts[present], self.sums[present]
        freedom = sums.shape[1] * (counts.sum() - len(counts))
        if freedom <= 0:
            raise UserError("modes of the data: no mode has two points; give points labels that say their modes")
        centres = sums / counts[:, None]
        scatter = (self.squares[present] - (centres * sums).sum(1)).sum()
        return Modes(centres, (scatter.clamp(min=0) / freedom).sqrt())
