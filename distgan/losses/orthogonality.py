"""Orthogonal regularization of a player's weights, for truncation (Brock et al. 2019, section 3.1)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class _View(Protocol):
    @property
    def network(self) -> nn.Module: ...


class OrthogonalRegularization:
    """1/2 sum over all weights W of |W W^T * (1 - I)|^2, without the diagonal of the products (eq. 3).

    W is a weight of two or more dimensions as a matrix (outputs, everything else), before spectral norm. At a weight of
    1e-4 the gradient is that of BigGAN-PyTorch (utils.py, `ortho`), 1e-4 * 2 (W W^T * (1 - I)) W, where eq. 3 with its
    beta of 1e-4 has twice as much. A submodule `shared_embedding` is exempt, as there.
    """

    def __call__(self, view: _View) -> Tensor:
        shared = getattr(view.network, "shared_embedding", None)
        exempt = {id(weight) for weight in shared.parameters()} if isinstance(shared, nn.Module) else set()
        matrices = [p.flatten(1) for p in view.network.parameters() if p.dim() > 1 and id(p) not in exempt]
        overlaps = [overlap(matrix) for matrix in matrices]
        return torch.stack(overlaps).sum() / 2 if overlaps else torch.zeros(())


def overlap(matrix: Tensor) -> Tensor:
    """Return the sum over all pairs of different rows of their squared dot product, each pair in both orders."""
    rows, columns = matrix.shape
    if rows <= columns:
        products = matrix @ matrix.t()
        return (products - products.diagonal().diag()).square().sum()
    # |W W^T| = |W^T W|, which is far smaller for the first layer of a generator, of 20 by 24,576.
    return (matrix.t() @ matrix).square().sum() - matrix.square().sum(1).square().sum()
