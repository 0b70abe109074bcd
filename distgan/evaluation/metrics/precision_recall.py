"""Precision and recall: the share of generated images that look real, and of real images that are generated.

Kynkäänniemi, Karras, Laine, Lehtinen, Aila, "Improved Precision and Recall Metric for Assessing Generative Models",
NeurIPS 2019, section 2. The manifold of a set of features is the union of balls around them, each of which reaches to
the k-th nearest other feature of the set (equation 1, closed balls). Precision is the share of generated features in
the real manifold; recall is the share of real features in the generated manifold (equation 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan.errors import UserError
from distgan.evaluation.numerics.neighbors import NeighborMetric, blocks, kth_nearest
from distgan.evaluation.real_statistics import RealFeatures

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext


class ManifoldPrecisionRecall(NeighborMetric):
    """Update with features and numbers of generated samples; compute `precision` and `recall`, in [0, 1]."""

    higher_is_better = True

    def compute(self) -> dict[str, Tensor]:
        """Compute both, float64 scalars. Collective: call on every rank, with the states of all ranks."""
        fakes, reals, real_radii = self._sides()
        fake_radii = kth_nearest(fakes, self.neighbors, self.runtime)
        realistic = torch.zeros(len(fakes), dtype=torch.bool, device=fakes.device)
        covered = torch.zeros(len(reals), dtype=torch.bool, device=fakes.device)
        for rows, columns, squared in blocks(fakes, reals, self.runtime):
            realistic[rows] |= (squared <= real_radii[columns]).any(1)
            covered[columns] |= (squared <= fake_radii[rows, None]).any(0)
        shares = {"precision": realistic, "recall": covered}
        return {name: self._any_rank(found).double().mean() for name, found in shares.items()}


class PrecisionRecall(ManifoldPrecisionRecall):
    """Precision and recall of an evaluation: `SuiteMetric`.

    Recall ranks checkpoints, because precision can rise when a generator collapses.
    """

    kinds = ("images",)
    takes = ("features", "numbers")
    main_value = "_recall"
    real_statistic = RealFeatures

    def __init__(
        self, context: EvaluationContext, reals: Mapping[str, Tensor], *, neighbors: int = 3, max_reals: int = 50_000
    ) -> None:
        """Prepare the features.

        Args:
            neighbors: k.
            max_reals: number of real images above which an addressed choice of so many is compared with.

        Raises:
            UserError: there are too few samples.
        """
        found = len(reals["rows"])
        if min(found, context.num_samples) <= neighbors:
            raise UserError(
                f"{context.name}: found {context.num_samples} generated and {found} real images, expected more than "
                f"neighbors = {neighbors} of each; raise evaluation.num_samples or max_reals, or lower neighbors"
            )
        super().__init__(reals["rows"], neighbors, context.runtime, context.name)
