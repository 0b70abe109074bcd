"""FID-infinity: FID extrapolated to infinitely many generated samples.

Chong and Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR 2020, section 3: FID is
biased by about c / N for N samples, where c depends on the generator. Its values for 15 numbers of samples, of which
the smallest is 5,000, are fitted by a line in 1 / N. The line's value at 0 is the metric. As in the authors' code each
subset is drawn from one sample. Their quasi-random latents are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan.errors import UserError
from distgan.evaluation.metrics.frechet import (
    RealMoments,
    Reference,
    frechet_distance,
    reference_of,
    warn_of_few_samples,
)
from distgan.evaluation.numerics.feature_rows import FeatureRows, gaussian_of_rows
from distgan.evaluation.numerics.subsets import draw_subsets

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

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
        """Prepare the reference. `real_statistics` is an option of the statistic, `RealMoments`.

        Raises UserError if there are too few samples.
        """
        reference, fewest = reference_of(reals), sample_counts(context.num_samples)[0]
        if fewest < 2:
            raise UserError(
                f"{context.name}: found {context.num_samples} generated images, expected at least 4; raise "
                "evaluation.num_samples, or remove fid_infinity from evaluation.metrics"
            )
        warn_of_few_samples(context, fewest, reference)
        super().__init__(context.runtime, context.name)
        self.real_samples = reference.samples
        self.register_buffer("mean", reference.mean, persistent=False)
        self.register_buffer("factor", reference.factor, persistent=False)

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
