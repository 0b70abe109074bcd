"""Looking at what a layer inside a network gives out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from distgan.errors import UserError


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """The submodule of that name, as in `named_modules`. Raises UserError naming the nearest ones."""
    layers: dict[str, nn.Module] = {
        known: layer
        for known, layer in network.named_modules()
        # Parametrizations make a layer's weights, and are no layers.
        if known and "parametrizations" not in known.split(".")
    }
    if name not in layers:
        near = difflib.get_close_matches(name, layers, n=3, cutoff=0.0)
        raise UserError(
            f"the network has no layer {name[:100]!r}; it has, for example, {', '.join(near)}", everywhere=True
        )
    return layers[name]


@contextmanager
def captured(network: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """The outputs of a layer, one for each time that it is called inside, with their gradients.

    They are copies, because the layer after it may work in place.

    Raises:
        UserError: there is no such layer, or, at the end, it was not called.
    """
    outputs: list[Tensor] = []
    layer = find_layer(network, name)
    handle = layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output.clone()))
    try:
        yield outputs
    finally:
        handle.remove()
    if not outputs:
        raise UserError(
            f"the layer {name!r} gives nothing out, because the network does not call it; choose one inside it, or "
            "another one",
            everywhere=True,
        )
