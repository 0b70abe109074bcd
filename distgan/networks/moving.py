"""Buffers that training changes, such as the vectors of spectral norm.

They are restored after a skipped update, copied to the EMA generator, and kept equal on all ranks. A module whose
buffers are the same on all ranks by themselves declares them in a class attribute `moving_buffers`, a tuple of names.
Those that a forward pass of a user's network changes are found by `contract.check_networks`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

_ATTRIBUTE = "_distgan_moving_buffers"


def declare_moving(network: nn.Module, names: Iterable[str]) -> None:
    """Record which buffers move, besides those that modules declare. Copies of the network keep the record."""
    known = {id(buffer) for buffer in _equal_moving_buffers(network)}
    setattr(network, _ATTRIBUTE, tuple(name for name in names if id(network.get_buffer(name)) not in known))


def foreign_moving_buffers(network: nn.Module) -> list[Tensor]:
    """Return the recorded buffers. Unlike those that modules declare, they may differ between ranks after a pass."""
    return [network.get_buffer(name) for name in getattr(network, _ATTRIBUTE, ())]


def moving_buffers(network: nn.Module) -> list[Tensor]:
    """Return all buffers that move. Look them up at each use, because an engine may replace the tensors."""
    return _equal_moving_buffers(network) + foreign_moving_buffers(network)


def _equal_moving_buffers(network: nn.Module) -> list[Tensor]:
    # Attributes of the class: `getattr` of a module searches its parameters and children too, in every update.
    return [
        module.get_buffer(name) for module in network.modules() for name in getattr(type(module), "moving_buffers", ())
    ]
