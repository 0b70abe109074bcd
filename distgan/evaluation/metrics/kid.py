"""Kernel (Inception) distance, KID: squared MMD of detector features under a cubic kernel.

Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018, section 4: k(x, y) = (x.y / d + 1)^3, the
unbiased estimate, averaged over 100 random subsets of 1,000 real and 1,000 generated samples. Unlike FID its expected
value does not depend on the number of samples, and an estimate may be slightly negative. The real subsets are of all
real samples. Only chosen samples are read and kept: at most 100,000.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.divergences import squared_mmd
from distgan.evaluation.numerics.subsets import draw_subsets
from distgan.evaluation.real_statistics import RealRows
from distgan.evaluation.states import joined

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

log = logging.getLogger("distgan")

SUBSETS = 100
SUBSET_SIZE = 1000
_REAL_SUBSETS = "kid/real subsets"


class Distance(NamedTuple):
    """Mean and population standard deviation over the subsets, float64 scalars."""

    mean: Tensor
    deviation: Tensor


class KernelDistanceToReference(Metric):
    """Update with features and numbers of generated samples; compute a `Distance` to the real features.

    Subsets are chosen by sample number, so the value does not depend on the split into batches and ranks. Only the
    features of chosen samples are kept. The real features stay where they are, on the host.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    features: list[Tensor] | Tensor
    numbers: list[Tensor] | Tensor

    def __init__(
        self,
        reals: Tensor,
        num_samples: int,
        *,
        real_numbers: Tensor | None = None,
        num_reals: int | None = None,
        **settings: Any,
    ) -> None:
        """Choose the subsets.

        Args:
            reals: real features, shape (m, d).
            num_samples: total number of generated samples over all ranks.
            real_numbers: indices of the features among all real samples, int64, shape (m,). Chosen samples without
                features are left out of their subsets. None: the features are those of all real samples.
            num_reals: number of all real samples; None: m.
            settings: keyword arguments of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        self.reals = reals
        num_reals = num_reals or len(reals)
        size = subset_size(num_samples, num_reals, SUBSET_SIZE)
        self.subsets, real_subsets = draw_subset_pairs(num_samples, num_reals, size, SUBSETS)
        place = torch.full((num_reals,), -1)
        place[torch.arange(len(reals)) if real_numbers is None else real_numbers] = torch.arange(len(reals))
        self.real_subsets = [places[places >= 0] for places in place[real_subsets]]
        self._kept = self.subsets.unique()
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor) -> None:
        """Add features, shape (n, d), and the samples' numbers in [0, num_samples), int64, shape (n,)."""
        kept = torch.isin(numbers.cpu(), self._kept)
        assert isinstance(self.features, list)
        assert isinstance(self.numbers, list)
        self.features.append(features.detach()[kept.to(features.device)])
        self.numbers.append(numbers.cpu()[kept].to(features.device))

    def compute(self) -> Distance:
        """Compute the distance of all samples of all ranks. Raises ValueError if samples are missing or repeated."""
        numbers = joined(self.numbers).long().cpu()
        if not torch.equal(numbers.sort().values, self._kept):
            raise ValueError(
                f"kid: found features of {len(numbers)} chosen samples, expected {len(self._kept)}, each once; "
                "update with every sample number once"
            )
        place = torch.empty(int(self._kept[-1]) + 1, dtype=torch.int64)
        place[numbers] = torch.arange(len(numbers))
        return subset_distance(joined(self.features), self.reals, place[self.subsets], self.real_subsets)


class RealSubsets(RealRows):
    """Features of the real images that the subsets chose: `rows` and their indices `numbers`, in order."""

    def __init__(self, context: EvaluationContext) -> None:
        reals = len(context.index)
        size = subset_size(context.num_samples, reals, SUBSET_SIZE)
        super().__init__("features", draw_subsets(reals, size, _REAL_SUBSETS, SUBSETS).unique())
        self.takes = ("features", "numbers")
        self.cache_name = f"real-kid-{size}"
        self.add_state("numbers", [], dist_reduce_fx="cat")
        self.numbers: list[Tensor] | Tensor

    def update(self, rows: Tensor, numbers: Tensor) -> None:  # type: ignore[override]
        """Add features, shape (n, d), and the samples' numbers, int64, shape (n,)."""
        super().update(rows)
        assert isinstance(self.numbers, list)
        self.numbers.append(numbers.cpu())

    def compute(self) -> dict[str, Tensor]:
        """Return the features and numbers, on the CPU."""
        return {**super().compute(), "numbers": joined(self.numbers).long()}


class KID(KernelDistanceToReference):
    """Kernel distance of an evaluation, with its deviation over the subsets: `SuiteMetric`."""

    kinds = ("images",)
    takes = ("features", "numbers")
    real_statistic = RealSubsets

    def __init__(self, context: EvaluationContext, reals: Mapping[str, Tensor]) -> None:
        """Choose the subsets. Raises UserError if there are too few samples."""
        generated, real = context.num_samples, len(context.index)
        size = subset_size(generated, real, SUBSET_SIZE)
        if size < 2:
            raise UserError(
                f"{context.name}: found {generated} generated and {real} real images, expected at least 4 of "
                "each; raise evaluation.num_samples, or remove kid from evaluation.metrics"
            )
        if size < SUBSET_SIZE and context.runtime.is_main:
            log.warning(
                "%s: %d generated and %d real images allow subsets of %d, the protocol uses %d; the value is noisier; "
                "raise evaluation.num_samples",
                context.name, generated, real, size, SUBSET_SIZE,
            )  # fmt: skip
        super().__init__(reals["rows"], generated, real_numbers=reals["numbers"], num_reals=real)
        fewest = min(map(len, self.real_subsets))
        if fewest < 2:
            raise UserError(
                f"{context.name}: found {fewest} readable real images in a subset of {size}, expected at least 2; "
                "repair the data or pack it again"
            )

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the mean and `std`."""
        distance = super().compute()
        return {"": distance.mean, "std": distance.deviation}


def subset_size(generated: int, real: int, wanted: int) -> int:
    """Return the wanted size, or half of the smaller side if that side has fewer samples, so that subsets differ."""
    fewer = min(generated, real)
    return wanted if fewer >= wanted else fewer // 2


def subset_distance(
    features: Tensor, reals: Tensor, subsets: Iterable[Tensor], real_subsets: Iterable[Tensor]
) -> Distance:
    """Compute KID of features (n, d) and (m, d) from pairs of subsets: int64 indices, shape (size,) each."""
    values = []
    for chosen, real in zip(subsets, real_subsets, strict=True):
        x, y = features[chosen.to(features.device)], reals[real.to(reals.device)].to(features.device)
        values.append(squared_mmd(x, y, cubic_kernel))
    return Distance(torch.stack(values).mean(), torch.stack(values).std(correction=0))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 for all pairs: (a, d) and (b, d) to (a, b)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def draw_subset_pairs(generated: int, real: int, size: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `count` pairs of subsets, of generated and of real samples: two tensors of shape (count, size), int64."""
    return (
        draw_subsets(generated, size, "kid/generated subsets", count, seed),
        draw_subsets(real, size, _REAL_SUBSETS, count, seed),
    )
