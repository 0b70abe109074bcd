"""Buffers that a forward pass in training mode changes, such as the vectors of spectral norm.

They are restored after a skipped update, copied to the EMA generator, and kept equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from distgan.networks.layers.spectral_norm import power_iteration_vectors

_ATTRIBUTE = "_distgan_moving_buffers"


def declare_moving(network: nn.Module, names: Iterable[str]) -> None:
    """Record which buffers move, besides those of distgan's layers. Copies of the network keep the record."""
    known = {id(vector) for vector in power_iteration_vectors(network)}
    setattr(network, _ATTRIBUTE, tuple(name for name in names if id(network.get_buffer(name)) not in known))


def foreign_moving_buffers(network: nn.Module) -> list[Tensor]:
    """Return the declared buffers. Unlike those of distgan's layers, they may differ between ranks after a pass."""
    return [network.get_buffer(name) for name in getattr(network, _ATTRIBUTE, ())]


def moving_buffers(network: nn.Module) -> list[Tensor]:
    """Return all buffers that move. Look them up at each use, because an engine may replace the tensors."""
    return power_iteration_vectors(network) + foreign_moving_buffers(network)
