"""Count the floating-point operations of convolutions and matrix products that torch dispatches.

`torch.utils.flop_counter.FlopCounterMode` does not support second derivatives of a module. Its formula for the backward
pass of a grouped convolution is too large by a factor of the number of groups.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountedFlops(TorchDispatchMode):
    """Context manager that counts operations in `total`. A multiply-add counts as two."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        operator = function.overloadpacket
        if operator is torch.ops.aten.convolution_backward:
            self.total += _convolution_backward(*args)
        elif operator in flop_registry:
            self.total += int(flop_registry[operator](*args, **(kwargs or {}), out_val=out))
        return out


def _convolution_backward(gradient: Any, inputs: Any, weight: Any, *rest: Any) -> int:
    """Return the operations of a convolution's backward pass.

    The gradients for the input and for the weight each cost as much as the forward pass, if they are requested.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, mask = rest
    places = (inputs if transposed else gradient).shape[2:]
    return int(2 * len(inputs) * prod(places) * weight.numel() * (mask[0] + mask[1]))
