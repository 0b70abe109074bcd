"""FID-infinity: FID extrapolated to infinitely many generated samples.

Chong and Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR 2020, section 3: FID is
biased by about c / N for N samples, where c depends on the generator. Its values for 15 numbers of samples, of which
the smallest is 5,000, are fitted by a line in 1 / N. The line's value at 0 is the metric. As in the authors' code each
subset is drawn from one sample. Their quasi-random latents are not part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan.errors import UserError
from distgan.evaluation.metrics.frechet import RealMoments, Reference, frechet_distance
from distgan.evaluation.metrics.kid import draw_subsets
from distgan.evaluation.numerics.feature_rows import FeatureRows, gaussian_of_rows

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

log = logging.getLogger("distgan")

POINTS = 15
FEWEST = 5000
"""Smallest number of samples of a point, or half of all if they are fewer than 10,000."""


class FIDInfinity(FeatureRows):
    """FID-infinity of an evaluation: `SuiteMetric`. The ranks share the distances."""

    kinds = ("images",)
    takes = ("features", "numbers")
    higher_is_better = False
    real_statistic = RealMoments
    mean: Tensor
    factor: Tensor

    def __init__(
        self, context: EvaluationContext, reals: Mapping[str, Tensor], real_statistics: str | None = None
    ) -> None:
        """Prepare the reference. Raises UserError if there are too few samples."""
        dimension, counts = len(reals["mean"]), sample_counts(context.num_samples)
        if counts[0] < 2:
            raise UserError(
                f"{context.name}: found {context.num_samples} generated images, expected at least 4; raise "
                "evaluation.num_samples, or remove fid_infinity from evaluation.metrics"
            )
        real_samples = int(reals["samples"]) if real_statistics is None else None
        if min(counts[0], real_samples or counts[0]) <= dimension and context.runtime.is_main:
            log.warning(
                "%s: found distances of %d generated to %s real images, expected more than %d of both, the number of "
                "features; with fewer, FID is no line in 1 / N; raise evaluation.num_samples or change the detector",
                context.name, counts[0], real_samples or "an unknown number of", dimension,
            )  # fmt: skip
        super().__init__()
        self.runtime, self.real_samples = context.runtime, real_samples
        self.register_buffer("mean", reals["mean"], persistent=False)
        self.register_buffer("factor", reals["factor"], persistent=False)

    def compute(self) -> Tensor:
        """Compute the extrapolated distance, a float64 scalar; it may be negative. Collective: call on every rank."""
        rows, reference = self.rows(), Reference(self.real_samples, self.mean, self.factor)
        counts = sample_counts(len(rows))
        distances = torch.zeros(POINTS, dtype=torch.float64, device=rows.device)
        for point in range(self.runtime.rank, POINTS, self.runtime.world_size):
            subset = draw_subsets(len(rows), counts[point], f"fid_infinity/subset {point}", 1)[0].sort().values
            distances[point] = frechet_distance(reference, gaussian_of_rows(rows[subset.to(rows.device)]))
        return intercept(torch.tensor(counts), self.runtime.all_reduce_sum(distances).cpu())


def sample_counts(total: int) -> list[int]:
    """Return the numbers of samples of the points, evenly spaced from the smallest to all."""
    fewest = min(FEWEST, total // 2)
    return [fewest + (total - fewest) * point // (POINTS - 1) for point in range(POINTS)]


def intercept(counts: Tensor, values: Tensor) -> Tensor:
    """Return the value at 1 / N = 0 of the line in 1 / N with the least squared error: shapes (n,) to a scalar."""
    x, y = 1 / counts.double(), values.double()
    offsets = x - x.mean()
    slope = (offsets * y).sum() / offsets.square().sum()
    return y.mean() - slope * x.mean()
