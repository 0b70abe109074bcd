"""Memorization-informed FID: FID, divided by how near generated images are to real ones if they are suspiciously near.

Bai, Lin, Raffel, Kan, "On Training Sample Memorization: Lessons from Benchmarking Generative Modeling with a
Large-scale Competition", KDD 2021, section 3: MiFID = FID / (d' + 1e-14), where d is the mean over generated images of
the smallest cosine distance 1 - |cos| to a real one. d' is d if it is below the threshold 0.1 of the Kaggle
competition, and 1 otherwise. torchmetrics takes the mean over real images of the smallest distance to a generated one
instead, which does not notice copies of a few.
"""

from __future__ import annotations

import logging
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
from distgan.evaluation.numerics.feature_rows import FeatureRows, gaussian_of_rows, row_blocks
from distgan.evaluation.numerics.subsets import choose_reals
from distgan.evaluation.precision import ieee_float32
from distgan.evaluation.states import joined

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime
    from distgan.evaluation.contract import EvaluationContext

log = logging.getLogger("distgan")

THRESHOLD = 0.1
_EPSILON = 1e-14
_ROWS, _COLUMNS = 512, 8192


class RealMomentsAndRows(RealMoments):
    """Moments of all real features as in `RealMoments`, and up to `max_reals` of the features: `rows`."""

    takes = ("features", "numbers")  # type: ignore[assignment]
    rows: list[Tensor] | Tensor

    def __init__(self, context: EvaluationContext, max_reals: int) -> None:
        super().__init__(context)
        self.cache_name = f"real-mifid-{max_reals}"
        self._kept = choose_reals(len(context.index), max_reals)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor) -> None:  # type: ignore[override]
        """Add features, shape (n, d), and the samples' numbers, int64, shape (n,)."""
        super().update(features)
        assert isinstance(self.rows, list)
        self.rows.append(features.detach().cpu()[torch.isin(numbers.cpu(), self._kept)])

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute `mean`, `factor` and `rows`. Raises UserError for fewer than two samples."""
        return {**super().compute(), "rows": joined(self.rows)}


class MiFID(FeatureRows):
    """Memorization-informed FID of an evaluation: `SuiteMetric`. The ranks share the cosine distances."""

    kinds = ("images",)
    takes = ("features", "numbers")
    higher_is_better = False
    real_statistic = RealMomentsAndRows
    mean: Tensor
    factor: Tensor

    def __init__(self, context: EvaluationContext, reals: Mapping[str, Tensor], *, max_reals: int = 200_000) -> None:
        """Prepare the reference.

        Args:
            max_reals: number of real images above which copies are looked for in an addressed choice of so many.

        Raises:
            UserError: there are fewer than two generated samples.
        """
        if context.num_samples < 2:
            raise UserError(
                f"{context.name}: found {context.num_samples} generated images, expected at least 2; raise "
                "evaluation.num_samples"
            )
        if len(context.index) > max_reals and context.runtime.is_main:
            log.warning(
                "%s: looking for copies of %d of %d real images; raise max_reals to find those of all",
                context.name, max_reals, len(context.index),
            )  # fmt: skip
        reference = reference_of(reals)
        warn_of_few_samples(context, context.num_samples, reference)
        super().__init__(context.runtime, context.name)
        self.real_samples, self.reals = reference.samples, reals["rows"]
        self.register_buffer("mean", reference.mean, persistent=False)
        self.register_buffer("factor", reference.factor, persistent=False)

    def compute(self) -> dict[str, Tensor]:
        """Compute the value and the mean cosine `distance`, float64 scalars, on rank 0. Collective on every rank."""
        rows = self.rows()
        distance = nearest_cosine_distances(rows, self.reals.to(rows.device), self.runtime).mean()
        if not self.runtime.is_main:
            return {}
        fid = frechet_distance(Reference(self.real_samples, self.mean, self.factor), gaussian_of_rows(rows))
        return {"": memorization_informed(fid, distance), "distance": distance}


def memorization_informed(fid: Tensor, distance: Tensor) -> Tensor:
    """Return MiFID from FID and the mean distance of generated images to their nearest real ones, scalars."""
    return fid / (distance.where(distance < THRESHOLD, 1.0) + _EPSILON)


def nearest_cosine_distances(rows: Tensor, others: Tensor, runtime: Runtime) -> Tensor:
    """Return 1 - |cos| of each row and the row of `others` for which it is smallest. Collective: call on every rank.

    The nearest is searched in float32. Its distance is computed in float64, so that a copy is at distance 0.

    Args:
        rows, others: shapes (n, d) and (m, d), the same on every rank. A row of zeros is at distance 1.

    Returns:
        float64, shape (n,), the same on every rank.
    """
    found = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for mine in row_blocks(len(rows), _ROWS, runtime):
        x = torch.nn.functional.normalize(rows[mine].double())
        best, index = torch.zeros(len(x), device=x.device), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for start in range(0, len(others), _COLUMNS):
            y = torch.nn.functional.normalize(others[start : start + _COLUMNS].double())
            with ieee_float32():
                nearest = (x.float() @ y.float().T).abs().max(1)
            index = index.where(nearest.values <= best, nearest.indices + start)
            best = best.maximum(nearest.values)
        nearest_rows = torch.nn.functional.normalize(others[index].double())
        found[mine] = (1 - (x * nearest_rows).sum(1).abs()).clamp(min=0)
    return runtime.all_reduce_sum(found)
