"""Noise of the generator's layers, and other draws of a sample's own, as functions of its latent.

StyleGAN2 draws noise for each layer and image, and a second latent for mixed styles. Networks are functions of latents
and labels, so these are drawn by the counter-based generator at the address that the latent's bits give (see
`randomness.addresses`). A sample is then a function of its latent and label, for any number of ranks and any batch, and
a resume is exact. The noise of different latents is independent, and that of different layers too.

FID in StyleGAN2's code uses random noise, as here in training and evaluation. Its pictures and videos use the same
noise for all images: see `constant_noise`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from distgan import randomness

SEED = 0
"""Seed of the draws. The seed of the run is in the latents."""


class AddressedNoise(nn.Module):
    """N(0, 1) for each pixel of several layers: addresses (n,) to one float32 tensor (n, 1, r, r) per resolution r.

    All layers are one draw, so that a GPU starts a few dozen kernels in place of hundreds.
    """

    def __init__(self, resolutions: Sequence[int]) -> None:
        super().__init__()
        self.resolutions = tuple(resolutions)
        self.constant = False

    def forward(self, addresses: Tensor) -> list[Tensor]:
        positions = addresses[:1] * 0 if self.constant else addresses
        sizes = [side * side for side in self.resolutions]
        drawn = randomness.normal(SEED, "noise", positions, (sum(sizes),)).split(sizes, dim=1)
        return [noise.unflatten(1, (1, side, side)) for noise, side in zip(drawn, self.resolutions, strict=True)]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.resolutions))


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
