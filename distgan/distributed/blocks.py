"""Blocks of a network: the parts that are sharded, compiled and recomputed one at a time.

A network declares them in an attribute `blocks`: modules in the order of the forward pass, which calls each of them as
a module. No block is inside another one, and no parameter is in two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


def declared_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that a network declares; none if its attribute `blocks` is something else or missing."""
    found = getattr(network, "blocks", ())
    if not isinstance(found, (nn.ModuleList, nn.Sequential, list, tuple)):
        return []
    blocks = list(found)
    return blocks if all(isinstance(block, nn.Module) for block in blocks) else []


def is_compiled(network: nn.Module, layer: nn.Module, compiled: object) -> bool:
    """Return True if a layer is in compiled code, given `training.compile`."""
    blocks = declared_blocks(network) if compiled == "blocks" else [network] if compiled else []
    return any(layer is module for block in blocks for module in block.modules())


@contextmanager
def eager(compiled: bool) -> Iterator[None]:
    """Run compiled code eagerly inside, which has second derivatives and calls the hooks of layers.

    Args:
        compiled: some code is compiled; without it this does nothing.
    """
    if not compiled:  # importing the compiler takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def checkpoint_activations(block: nn.Module) -> None:
    """Compute a block's activations a second time in the backward pass, instead of keeping them.

    The block's class becomes a subclass, so that names of parameters and copies of the block stay as they are.
    """
    kind: Any = type(block)
    block.__class__ = _checkpointed(kind)


@cache
def _checkpointed(kind: Any) -> Any:
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        run = partial(kind.forward, self)
        if not torch.is_grad_enabled():
            return run(*arguments, **named)
        # Compiled code keeps the kernels that it was compiled with, and takes no contexts.
        if torch.compiler.is_compiling():
            return checkpoint(run, *arguments, use_reentrant=False, **named)
        return checkpoint(run, *arguments, use_reentrant=False, context_fn=_same_attention, **named)

    # Code of its own, because the compiler limits the number of variants of one code, over all kinds of blocks.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{kind.__name__}")
    return type(f"Checkpointed{kind.__name__}", (kind,), {"forward": forward})


def _same_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts for both forward passes. The second one has the kernels of attention that the first one has."""
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return nullcontext(), _Attention([kernel for kernel, on in enabled.items() if on])


class _Attention:
    """`sdpa_kernel` that can be entered again: a second derivative runs the block a third time."""

    def __init__(self, kernels: list[SDPBackend]) -> None:
        self._kernels = kernels
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        context = sdpa_kernel(self._kernels)
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)
