"""Path-length regularization of a style-based generator (Karras et al. 2020, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distgan.distributed import collectives
from distgan.errors import UserError

_PARTS = ("styles", "synthesize", "path_length")


class _View(Protocol):
    @property
    def network(self) -> nn.Module: ...
    @property
    def latents(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def normal(self) -> Callable[..., Tensor]: ...


class PathLength:
    """E (|J^T y|_2 - a)^2 with images y ~ N(0, I / pixels), the Jacobian J of the image, and a mean a (eq. 4).

    |J^T y| is the gradient of <image, y> with respect to the styles: the root of the mean over layers of its squared
    norm, as in the released code, which weighs the term 2 in every fourth update of the generator, multiplied by 4. `a`
    is the mean length over training, of the samples of all ranks.

    The generator needs methods `styles(latents, labels)`, which returns (n, layers, size), and
    `synthesize(styles, latents)`, which returns images, and a buffer `path_length` of shape () for `a`, named in the
    class attribute `moving_buffers` (see `networks.moving`), so that it is saved, and restored after a skipped update.

    Args:
        decay: weight of an update's mean length in `a`.
        shrink: use every `shrink`-th sample, because the second derivative takes memory. It divides the samples of a
            process, so that they are the same for any number of ranks.
    """

    compares_batch = True

    def __init__(self, decay: float = 0.01, shrink: int = 2) -> None:
        self.decay = decay
        self.shrink = shrink

    def __call__(self, view: _View) -> Tensor:
        network: Any = view.network
        if missing := [part for part in _PARTS if not hasattr(network, part)]:
            raise UserError(
                f"objective.terms: path_length: {type(network).__name__} has no {missing[0]}; use it with player: "
                "generator and generator.architecture: stylegan2, or leave it out",
                everywhere=True,
            )
        if len(view.latents) % self.shrink:
            raise UserError(
                f"objective.terms: path_length: shrink = {self.shrink} does not divide the {len(view.latents)} samples "
                "per process and micro-batch; change one of them",
                everywhere=True,
            )
        latents = view.latents[:: self.shrink]
        styles: Tensor = network.styles(latents, None if view.labels is None else view.labels[:: self.shrink])
        images: Tensor = network.synthesize(styles, latents)
        noise = view.normal("path length", *images.shape[1:])[:: self.shrink].to(images.dtype)
        product = (images * noise).sum() / math.sqrt(images[0, 0].numel())
        (slopes,) = torch.autograd.grad(product, styles, create_graph=True)
        lengths = slopes.square().sum(2).mean(1).sqrt()
        average: Tensor = network.path_length
        mean = average.lerp(collectives.all_reduce_mean(lengths.mean()), self.decay)
        average.copy_(mean.detach())
        return (lengths - mean).square().mean()
