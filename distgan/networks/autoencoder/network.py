"""Convolutional autoencoder whose encoder gives the posterior of a latent, and what is asked of such a network.

Rombach, Blattmann, Lorenz, Esser, Ommer, "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022,
section 3.1, after Esser, Rombach, Ommer, "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021. Like
theirs without attention, and with group norm of at most 8 groups.

A network that reconstructs, built-in or yours, takes a generator's place. It has:

- the attribute `reconstructs`, True, and for the adaptive weight `last_layer`, the name of the decoder's last layer;
- `encode`: images (n, C, R, R) in [-1, 1] to moments (n, 2c, h, h), means and logarithms of variances of latents;
- `decode`: latents (n, c, h, h) to images;
- `forward(images, noise)`: both, with noise as in `reconstruct`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.shape import SampleShape

LOG_VARIANCES = -30.0, 20.0
"""Range of logarithms of variances, as of latents that are data."""
_GROUPS = 8


def reconstruct(network: Any, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encode images, draw their latents and decode them. Return the reconstructions and the moments, (n, 2c, h, h).

    Logarithms of variances are clamped to `LOG_VARIANCES`.

    Args:
        network: see above.
        noise: N(0, 1) of shape (n, latent_size), one number for each element of a latent; None decodes the means.
    """
    means, log_variances = network.encode(images).chunk(2, dim=1)
    latents, log_variances = means, log_variances.clamp(*LOG_VARIANCES)
    if noise is not None:
        latents = means + (0.5 * log_variances).exp() * noise.to(means.dtype).view_as(means)
    return network.decode(latents), torch.cat((means, log_variances), dim=1)


class Autoencoder(nn.Module):
    """Images (n, C, R, R) in [-1, 1] to reconstructions, unbounded, by latents of `downsampling` times smaller sides.

    Its latents have as many channels as `latent_size` gives: latent_size / (R / downsampling)^2.

    Raises:
        UserError: the sizes do not divide each other.
    """

    reconstructs = True
    last_layer = "decoder.output"

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        max_width: int = 512,
        depth: int = 2,
        downsampling: int = 8,
    ) -> None:
        super().__init__()
        halvings = downsampling.bit_length() - 1
        if downsampling != 1 << halvings or shape.resolution % downsampling:
            raise UserError(
                f"generator.downsampling = {downsampling}: expected a power of two that divides data.resolution = "
                f"{shape.resolution}; change it"
            )
        side = shape.resolution // downsampling
        channels, rest = divmod(latent_size, side * side)
        if rest:
            raise UserError(
                f"generator.latent_size = {latent_size}: expected a multiple of {side} x {side} = {side * side}, the "
                f"size of a channel of the latents; set {side * side * max(1, channels)}"
            )
        widths = [min(width << number, max_width) for number in range(halvings + 1)]
        self.encoder = Encoder(shape.channels, widths, depth, 2 * channels)
        self.decoder = Decoder(channels, widths[::-1], depth, shape.channels)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return reconstruct(self, images, noise)[0]

    def encode(self, images: Tensor) -> Tensor:
        """Return moments (n, 2c, h, h): means and logarithms of variances."""
        moments: Tensor = self.encoder(images)
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (n, C, R, R) of latents (n, c, h, h)."""
        images: Tensor = self.decoder(latents)
        return images


class Encoder(nn.Module):
    """Stages of residual blocks; a convolution of stride 2 is between two of them."""

    def __init__(self, channels: int, widths: list[int], depth: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), *_blocks(widths[0], depth)]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), *_blocks(after, depth)]
        self.stages = nn.Sequential(*layers, _group_norm(widths[-1]), nn.SiLU())
        self.output = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        moments: Tensor = self.output(self.stages(images))
        return moments


class Decoder(nn.Module):
    """Stages of residual blocks; the next larger size is by nearest neighbors and a convolution."""

    def __init__(self, channels: int, widths: list[int], depth: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), *_blocks(widths[0], depth)]
        for before, after in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), *_blocks(after, depth)]
        self.stages = nn.Sequential(*layers, _group_norm(widths[-1]), nn.SiLU())
        self.output = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.output(self.stages(latents))
        return images


class Block(nn.Module):
    """x + f(x), with f twice group norm, SiLU and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_group_norm(channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, activations: Tensor) -> Tensor:
        change = activations
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            change = convolution(F.silu(norm(change)))
        return activations + change


def _blocks(channels: int, depth: int) -> list[nn.Module]:
    return [Block(channels) for _ in range(depth)]


def _group_norm(channels: int) -> nn.GroupNorm:
    # A group of one channel would remove its mean, with it the bias before, and what the channel says of the image.
    groups = max(1, min(math.gcd(_GROUPS, channels), channels // 2))
    return nn.GroupNorm(groups, channels)
