"""Density and coverage: how densely generated images lie among the real ones, and the share of reals that they cover.

Naeem, Oh, Uh, Choi, Yoo, "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, section 3. Each
real feature has an open ball that reaches to its k-th nearest other real feature. Density is 1 / (k M) times the number
of pairs of one of the M generated features and a ball that holds it. Its expected value is 1 for equal distributions,
and it can exceed 1. Coverage is the share of balls that hold a generated feature. Unlike recall it builds no balls
around generated features, so that outliers among these cannot raise it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan.errors import UserError
from distgan.evaluation.numerics.neighbors import NeighborMetric, blocks
from distgan.evaluation.real_statistics import RealFeatures

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext


class ManifoldDensityCoverage(NeighborMetric):
    """Update with features and numbers of generated samples; compute `density` >= 0 and `coverage` in [0, 1]."""

    higher_is_better = True

    def compute(self) -> dict[str, Tensor]:
        """Compute both, float64 scalars. Collective: call on every rank, with the states of all ranks."""
        fakes, reals, radii = self._sides()
        pairs = torch.zeros((), dtype=torch.int64, device=fakes.device)
        covered = torch.zeros(len(reals), dtype=torch.bool, device=fakes.device)
        for _, columns, squared in blocks(fakes, reals, self.runtime):
            inside = squared < radii[columns]
            pairs += inside.sum()
            covered[columns] |= inside.any(0)
        density = self.runtime.all_reduce_sum(pairs).double() / (self.neighbors * len(fakes))
        return {"density": density, "coverage": self._any_rank(covered).double().mean()}


class DensityCoverage(ManifoldDensityCoverage):
    """Density and coverage of an evaluation: `SuiteMetric`.

    Coverage ranks checkpoints, because density can rise when a generator collapses.
    """

    kinds = ("images",)
    takes = ("features", "numbers")
    main_value = "_coverage"
    real_statistic = RealFeatures

    def __init__(
        self, context: EvaluationContext, reals: Mapping[str, Tensor], *, neighbors: int = 5, max_reals: int = 10_000
    ) -> None:
        """Prepare the features.

        Args:
            neighbors: k.
            max_reals: number of real images above which an addressed choice of so many is compared with.

        Raises:
            UserError: there are too few real samples.
        """
        found = len(reals["rows"])
        if found <= neighbors + 1:
            raise UserError(
                f"{context.name}: found {found} real images, expected more than neighbors + 1 = {neighbors + 1}; raise "
                "max_reals, lower neighbors, or evaluate on more data"
            )
        super().__init__(reals["rows"], neighbors, context.runtime, context.name)
