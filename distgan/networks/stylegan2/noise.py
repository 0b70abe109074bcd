"""Noise of the generator's layers, and other draws of a sample's own, as functions of its latent.

StyleGAN2 draws noise for each layer and image, and a second latent for mixed styles. Networks are functions of latents
and labels, so these are drawn by the counter-based generator at the address that the latent's bits give (see
`randomness.addresses`). A sample is then a function of its latent and label, for any number of ranks and any batch, and
a resume is exact. The noise of different latents is independent, and that of different layers too.

FID in StyleGAN2's code uses random noise, as here in training and evaluation. Its pictures and videos use the same
noise for all images: see `constant_noise`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distgan import randomness

SEED = 0
"""Seed of the draws. The seed of the run is in the latents."""


class AddressedNoise(nn.Module):
    """A learned strength, from 0, times N(0, 1) for each pixel: addresses (n,) to (n, 1, R, R)."""

    def __init__(self, resolution: int, purpose: str) -> None:
        super().__init__()
        self.resolution = resolution
        self.purpose = purpose
        self.constant = False
        # Not a scalar, because FSDP2 cannot shard scalars.
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, addresses: Tensor) -> Tensor:
        positions = addresses[:1] * 0 if self.constant else addresses
        drawn = randomness.normal(SEED, self.purpose, positions, (1, self.resolution, self.resolution))
        return drawn.to(self.strength.dtype) * self.strength

    def extra_repr(self) -> str:
        return f"{self.resolution}, {self.purpose!r}"


@contextmanager
def constant_noise(network: nn.Module) -> Iterator[None]:
    """Give all samples that a network makes inside the block the same noise, so that images along a path change
    smoothly. Networks without noise are left as they are."""
    layers = [module for module in network.modules() if isinstance(module, AddressedNoise)]
    before = [layer.constant for layer in layers]
    for layer in layers:
        layer.constant = True
    try:
        yield
    finally:
        for layer, constant in zip(layers, before, strict=True):
            layer.constant = constant
