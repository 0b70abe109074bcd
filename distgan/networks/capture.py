"""Looking at what a layer inside a network gives out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from distgan.errors import UserError


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """The submodule of that name, as in `named_modules`. Raises UserError naming the nearest ones."""
    layers: dict[str, nn.Module] = {known: layer for known, layer in network.named_modules() if known}
    if name not in layers:
        near = difflib.get_close_matches(name, layers, n=3, cutoff=0.0)
        raise UserError(f"the network has no layer {name[:100]!r}; it has, for example, {', '.join(near)}")
    return layers[name]


@contextmanager
def captured(network: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """The outputs of a layer, one for each time the network is called inside."""
    outputs: list[Tensor] = []
    handle = find_layer(network, name).register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
