"""Capture the outputs of a layer inside a network."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from distgan.errors import UserError


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """Return the submodule of that name, as in `named_modules`. Raises UserError that lists similar names."""
    layers: dict[str, nn.Module] = {
        known: layer
        for known, layer in network.named_modules()
        # Parametrizations compute weights; they are not layers.
        if known and "parametrizations" not in known.split(".")
    }
    if name not in layers:
        near = difflib.get_close_matches(name, layers, n=3, cutoff=0.0)
        raise UserError(
            f"the network has no layer {name[:100]!r}; similar names are {', '.join(near)}", everywhere=True
        )
    return layers[name]


@contextmanager
def captured(network: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Yield a list that collects the outputs of a layer, with their gradients, one per call inside.

    Outputs are copied, because the next layer may work in place.

    Raises:
        UserError: there is no such layer, or it was not called inside.
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
            f"the layer {name!r} has no output, because the network does not call it; choose one inside it, or "
            "another one",
            everywhere=True,
        )
