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

import torch
from torch import Tensor, nn

from distgan import randomness

_SEED = 0
"""Seed of the draws. The seed of the run is in the latents."""


class AddressedNoise(nn.Module):
    """N(0, 1) for each pixel of several layers: latents (n, d) to one float32 tensor (n, 1, r, r) per resolution r.

    All layers are one draw, so that a GPU starts a few dozen kernels in place of hundreds.
    """

    def __init__(self, resolutions: Sequence[int]) -> None:
        super().__init__()
        self.resolutions = tuple(resolutions)
        self.constant = False

    # On a CPU, inductor (PyTorch 2.14) writes C++ of the integer operations that does not compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, latents: Tensor) -> list[Tensor]:
        addresses = randomness.addresses(latents)
        positions = addresses[:1] * 0 if self.constant else addresses
        sizes = [side * side for side in self.resolutions]
        drawn = randomness.normal(_SEED, "noise", positions, (sum(sizes),)).split(sizes, dim=1)
        return [noise.unflatten(1, (1, side, side)) for noise, side in zip(drawn, self.resolutions, strict=True)]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.resolutions))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def draw_mixing(latents: Tensor, layers: int, probability: float) -> tuple[Tensor, Tensor]:
    """Draw what mixes the styles of samples (Karras et al. 2019, section 3.1), as functions of their latents (n, d).

    Returns:
        Second latents of N(0, 1), in the shape and dtype of the first. And whether each of the `layers` has its style
        of the second latent, bool (n, layers): with the probability asked for, from one of layers 1 to `layers` - 1 on.
    """
    addresses = randomness.addresses(latents)
    second = randomness.normal(_SEED, "style mixing/latents", addresses, latents.shape[1:]).to(latents.dtype)
    mixed = randomness.uniform(_SEED, "style mixing/mixed", addresses) < probability
    first = 1 + randomness.integers(_SEED, "style mixing/first", addresses, layers - 1)
    return second, (torch.arange(layers, device=latents.device) >= first[:, None]) & mixed[:, None]


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
