"""Divergences between known distributions: histograms, samples on a line, or normal distributions.

GAN losses estimate these divergences, and GAN metrics are built from them. Logarithms are natural. All functions
compute in float64 for any input dtype, and are differentiable wherever the divergence is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p / q), infinite if q is 0 where p is not (Kullback and Leibler 1951).

    Args:
        p, q: masses >= 0 of the same k events, shape (k,). Each is divided by its sum.
    """
    p, q = _normalized(p), _normalized(q)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in [0, log 2]: 0 if equal, log 2 if disjoint (Lin 1991).

    Args:
        p, q: as for `kl_divergence`.
    """
    p, q = _normalized(p), _normalized(q)
    mixture = (p + q) / 2
    return (kl_divergence(p, mixture) + kl_divergence(q, mixture)) / 2


def wasserstein(p: Tensor, q: Tensor) -> Tensor:
    """Earth mover's distance of two histograms with unit bin spacing: sum |P - Q| over their cumulative masses.

    This is the least mass times distance that turns one into the other. Unit: mass times bins, not normalized.

    Args:
        p, q: masses >= 0, shape (k,), with equal sums.

    Raises:
        ValueError: the sums differ.
    """
    p, q = _masses(p), _masses(q)
    if not torch.isclose(p.sum(), q.sum(), rtol=1e-6):
        raise ValueError(f"p, q: found sums {p.sum():g} and {q.sum():g}, expected equal sums; normalize both")
    return (p - q).cumsum(0)[:-1].abs().sum()


def wasserstein_of_samples(x: Tensor, y: Tensor) -> Tensor:
    """W1 of two sets of equally weighted points on a line: the area between their distribution functions.

    Args:
        x, y: shapes (n,) and (m,), not empty.
    """
    points = torch.cat((x, y)).double().sort().values
    below = points[:-1].contiguous()
    first, second = (
        torch.searchsorted(side.double().sort().values, below, right=True).double() / len(side) for side in (x, y)
    )
    return ((first - second).abs() * points.diff()).sum()


def squared_wasserstein_of_normals(mean: Tensor, covariance: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Squared W2, also called Fréchet distance, of two normal distributions (Dowson and Landau 1982).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)). Use `evaluation.metrics.frechet` for thousands of
    dimensions.

    Args:
        mean, mean2: shape (d,).
        covariance, covariance2: shape (d, d), symmetric and positive semidefinite.
    """
    mean, covariance, mean2, covariance2 = (value.double() for value in (mean, covariance, mean2, covariance2))
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    root = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T
    product: Tensor = root @ covariance2 @ root
    root_trace: Tensor = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    return (mean - mean2).square().sum() + covariance.trace() + covariance2.trace() - 2 * root_trace


def squared_mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3); may be negative.

    mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j).

    Args:
        x, y: samples, shapes (n, d) and (m, d), at least two each.
        kernel: maps points of shapes (a, d) and (b, d) to kernel values, shape (a, b).
    """

    def mean_off_diagonal(samples: Tensor) -> Tensor:
        values = kernel(samples, samples)
        return (values.sum() - values.trace()) / (len(samples) * (len(samples) - 1))

    x, y = x.double(), y.double()
    return mean_off_diagonal(x) + mean_off_diagonal(y) - 2 * kernel(x, y).mean()


def _masses(histogram: Tensor) -> Tensor:
    assert histogram.dim() == 1, "histogram: expected one dimension"
    return histogram.double()


def _normalized(histogram: Tensor) -> Tensor:
    masses = _masses(histogram)
    return masses / masses.sum()
