"""Augmentation of the discriminator's inputs: differentiable functions of a batch and of addressed draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class AugmentationDraws(NamedTuple):
    """Random numbers of one batch. Those of a sample depend on its address alone, and not on the other samples."""

    uniform: Callable[..., Tensor]
    """`uniform("purpose", *shape)` draws U[0, 1) of shape (n, *shape), the same for any number of ranks."""
    normal: Callable[..., Tensor]
    """`normal("purpose", *shape)` draws N(0, 1) of shape (n, *shape)."""
    probability: float | Tensor
    """`objective.augmentation.probability` at this update, in [0, 1]: a number or a 0-d tensor."""
    reference: Tensor | None = None
    """(n, *sizes): samples of which statistics are taken, where those given are levels or perturbed copies, which are
    to be augmented alike. None: those given."""


Augmentation = Callable[[Tensor, AugmentationDraws], Tensor]
"""What augments: samples (n, *sizes), float32 or float64, and draws to samples of the same shape and dtype. It is
differentiable twice in the samples, and the result for a sample does not depend on the others."""
