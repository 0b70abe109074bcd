"""Spectral normalisation's state."""

from __future__ import annotations

from torch import Tensor, nn


def power_iteration_vectors(network: nn.Module) -> list[Tensor]:
    """The vectors that a training forward pass moves."""
    return [buffer for name, buffer in network.named_buffers() if name.endswith(("._u", "._v"))]
