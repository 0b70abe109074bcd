"""Spectral normalization (Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for GANs", ICLR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

NORMALIZED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
"""Layer types that `add_spectral_norm` applies to."""

_EPS = 1e-12
_WARM_UP = 15


class SpectralNorm(nn.Module):
    """Divide a weight, as a matrix of (outputs, everything else), by its largest singular value (eq. 8).

    Each forward pass in training mode does one step of the power iteration for the singular vectors u and v. They are
    constants in the gradient, and sigma = u^T W v (appendix A). They start from N(0, 1) with a few steps, so that a
    network is usable in evaluation mode from the start. They depend only on the weights and the number of forward
    passes, so they are the same on all ranks.

    This is `torch.nn.utils.parametrizations.spectral_norm`, but in float32 under autocast, where sigma would have the
    three digits of bfloat16.
    """

    moving_buffers = ("u", "v")

    def __init__(self, weight: Tensor, outputs_dim: int) -> None:
        super().__init__()
        self.outputs_dim = outputs_dim
        matrix = self._matrix(weight.detach())
        self.register_buffer("u", torch.randn(matrix.shape[0], dtype=matrix.dtype, device=matrix.device))
        self.register_buffer("v", torch.randn(matrix.shape[1], dtype=matrix.dtype, device=matrix.device))
        self.u: Tensor
        self.v: Tensor
        for _ in range(_WARM_UP):
            self._iterate(matrix)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight)
            u, v = self._iterate(matrix) if self.training else (self.u, self.v)
            return weight / torch.dot(u, torch.mv(matrix, v))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, self.outputs_dim).flatten(1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step of the power iteration. Return copies, which a later step does not change."""
        v = F.normalize(torch.mv(matrix.t(), self.u), dim=0, eps=_EPS)
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=_EPS)
        self.u.copy_(u)
        self.v.copy_(v)
        return u, v

    def extra_repr(self) -> str:
        return f"{len(self.u)} x {len(self.v)}"


def add_spectral_norm(network: nn.Module) -> None:
    """Divide the weights, initialized before, of a network's convolutions, dense layers and embeddings."""
    for layer in [module for module in network.modules() if isinstance(module, NORMALIZED)]:
        norm = SpectralNorm(layer.weight, outputs_dim=1 if isinstance(layer, nn.ConvTranspose2d) else 0)
        # `unsafe` skips checks that would call the parametrization.
        parametrize.register_parametrization(layer, "weight", norm, unsafe=True)


def power_iteration_vectors(network: nn.Module) -> list[Tensor]:
    """Return the vectors u and v of all layers: the buffers that a forward pass in training mode changes."""
    return [
        vector for module in network.modules() if isinstance(module, SpectralNorm) for vector in (module.u, module.v)
    ]
