"""Fréchet distance between two Gaussians; FID if they are fitted to detector features.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
Nash Equilibrium", NeurIPS 2017, equation 6 (from Dowson and Landau, 1982):

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

With S1 = L L^T, the eigenvalues of S1 S2 are those of the symmetric matrix L^T S2 L, so the last trace is the sum of
their roots. A symmetric eigenproblem is several times faster than a general one or a matrix root, and its eigenvalues
are real. L is computed once for all distances to the same S1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distgan.evaluation.comparison.published_statistics import PublishedStatistics, read_statistics
from distgan.evaluation.moments import Gaussian, Moments

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

log = logging.getLogger("distgan")

_BLOCK = 256


class Reference(NamedTuple):
    """Factorized Gaussian of the fixed side (the real images), float64."""

    samples: int | None
    """None if it is not known."""
    mean: Tensor
    """Shape (d,)."""
    factor: Tensor
    """Lower-triangular L with L L^T the covariance, shape (d, d)."""


class FrechetDistanceToReference(Moments):
    """Squared Fréchet distance of features to a reference: update with (n, d) batches, compute a float64 scalar.

    Make the reference from the moments of the other side: `make_reference(moments.compute())`.
    """

    higher_is_better = False
    mean: Tensor
    factor: Tensor

    def __init__(self, reference: Reference, **settings: Any) -> None:
        """settings: keyword arguments of `torchmetrics.Metric`."""
        super().__init__(len(reference.mean), **settings)
        self.samples = reference.samples
        self.register_buffer("mean", reference.mean, persistent=False)
        self.register_buffer("factor", reference.factor, persistent=False)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Compute the distance of all samples of all ranks. Raises UserError for fewer than two."""
        return frechet_distance(Reference(self.samples, self.mean, self.factor), super().compute())


class RealMoments(Moments):
    """Mean and factorized covariance of the features of all real samples."""

    cache_name = "real"
    takes = "features"
    chosen: Tensor | None = None

    def __init__(self, context: EvaluationContext, real_statistics: str | None = None) -> None:
        """Prepare the sums, or read a file of published statistics in place of all images.

        Raises UserError for a file that does not fit the detector.
        """
        assert context.detector is not None
        super().__init__(context.detector.dimension)
        self.published: PublishedStatistics | None = None
        if real_statistics is not None:
            self.published = read_statistics(Path(real_statistics), context.detector)
            self.cache_name = f"published-{self.published.digest}"
            self.chosen = torch.empty(0, dtype=torch.int64)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute `mean` (d,) and `factor` (d, d), see `Reference`.

        Raises UserError for fewer than two samples, and for a published matrix that is not a covariance.
        """
        if self.published is not None:
            self.published.check_covariance()
            return {"mean": self.published.mean, "factor": triangular_factor(self.published.covariance).contiguous()}
        reference = make_reference(super().compute())
        return {"mean": reference.mean, "factor": reference.factor}


class FID(FrechetDistanceToReference):
    """Fréchet distance of an evaluation: `SuiteMetric`."""

    kinds = ("images",)
    takes = "features"
    real_statistic = RealMoments

    def __init__(
        self, context: EvaluationContext, reals: Mapping[str, Tensor], real_statistics: str | None = None
    ) -> None:
        """Prepare the reference. `real_statistics` is an option of the statistic, `RealMoments`."""
        reference = reference_of(reals)
        warn_of_few_samples(context, context.num_samples, reference)
        super().__init__(reference)


def reference_of(reals: Mapping[str, Tensor]) -> Reference:
    """Return what `RealMoments` computed. Published statistics, of no samples here, are of an unknown number."""
    return Reference(int(reals["samples"]) or None, reals["mean"], reals["factor"])


def warn_of_few_samples(context: EvaluationContext, generated: int, reference: Reference) -> None:
    """Warn on rank 0 if a side has at most as many samples as there are features, as far as this is known."""
    dimension, reals = len(reference.mean), reference.samples
    if min(generated, reals or generated) <= dimension and context.runtime.is_main:
        log.warning(
            "%s: comparing %d generated and %s real images, expected more than %d, the number of features; the value "
            "is far too large and comparable only at equal sample counts; raise evaluation.num_samples or change "
            "evaluation.detector",
            context.name, generated, reals or "an unknown number of", dimension,
        )  # fmt: skip


def make_reference(gaussian: Gaussian) -> Reference:
    """Factorize one side, for any number of distances to it."""
    # Contiguous, as if read from a file: products then sum in the same order, and distances are bitwise equal.
    return Reference(gaussian.samples, gaussian.mean, triangular_factor(gaussian.covariance).contiguous())


def frechet_distance(reference: Reference, gaussian: Gaussian) -> Tensor:
    """Return the squared Fréchet distance, a float64 scalar >= 0.

    Rounding moves the eigenvalues by up to sqrt(d) * 2.2e-16 of the largest, which matters only to the roots of zeros.
    A covariance of n samples has at least d - n + 1 zero eigenvalues; that many of the smallest are dropped, for the
    smaller known n of both sides. Zeros of constant features are recognized by this bound: eigenvalues below it count
    as 0. An eigenvalue at the bound moves the trace of the root by (sqrt(d) * 2.2e-16)^(1/2) of its largest term, 1e-7
    at d = 2048.
    """
    rank = min(reference.samples or gaussian.samples, gaussian.samples) - 1
    eigenvalues = torch.linalg.eigvalsh(_congruence(reference.factor, gaussian.covariance))[-rank:]
    noise = math.sqrt(len(gaussian.mean)) * torch.finfo(torch.float64).eps * eigenvalues[-1]
    root_trace = eigenvalues.where(eigenvalues > noise, 0.0).sqrt().sum()
    means = (reference.mean - gaussian.mean).square().sum()
    traces = reference.factor.square().sum() + gaussian.covariance.trace()
    distance: Tensor = (means + traces - 2 * root_trace).clamp(min=0)
    return distance


def triangular_factor(covariance: Tensor) -> Tensor:
    """Return lower-triangular L, shape (d, d), with L L^T the covariance up to rounding, even if it is singular."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        root = eigenvectors * eigenvalues.clamp(min=0).sqrt()
        factor = torch.linalg.qr(root.T, mode="r").R.T.contiguous()
    return factor


def _congruence(factor: Tensor, covariance: Tensor) -> Tensor:
    """Return the lower triangle of L^T S L for lower-triangular L; ignore the entries above the diagonal.

    Column block j of L is 0 above row j, and row i of L^T is 0 before column i. Skipping these zeros leaves a third of
    the work of two full products.
    """
    product = torch.zeros_like(covariance)
    for start in range(0, len(covariance), _BLOCK):
        tail = factor[start:, start : start + _BLOCK]
        product[start:, start : start + _BLOCK] = factor[start:, start:].T @ (covariance[start:, start:] @ tail)
    return product
