"""Mapping of latents and labels to styles (Karras et al., "A Style-Based Generator Architecture", CVPR 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.distributed.collectives import at_least_float32
from distgan.networks.layers.equalized import EqualizedLinear, ScaledLeakyReLU, pixel_norm

_RATE = 0.01
"""Multiplier of the mapping's learning rate (section C)."""


class Mapping(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to vectors (n, size).

    Latents and a learned vector of the label, each divided by its root mean square, pass through dense layers. They are
    float32 under autocast too, because they cost little and every layer depends on them.

    Args:
        latent_size: 0 for a mapping of labels alone.
        num_classes: 0 for a mapping of latents alone.
        layers: number of dense layers.
    """

    def __init__(self, latent_size: int, num_classes: int, size: int, layers: int) -> None:
        super().__init__()
        self.embedding = EqualizedLinear(num_classes, size, gain=1.0) if num_classes else None
        inputs = latent_size + (size if num_classes else 0)
        self.layers = nn.Sequential()
        for number in range(layers):
            dense = EqualizedLinear(size if number else inputs, size, gain=1.0, rate=_RATE)
            self.layers.extend([dense, ScaledLeakyReLU()])

    def forward(self, latents: Tensor | None, labels: Tensor | None) -> Tensor:
        given = labels if latents is None else latents
        assert given is not None, "a mapping of labels needs labels"
        parts = [] if latents is None else [at_least_float32(latents)]
        with torch.autocast(given.device.type, enabled=False):
            if self.embedding is not None:
                assert labels is not None, "a class-conditional network needs labels"
                # The dense layer of one-hot labels, without these.
                rows = (self.embedding.weight * self.embedding.scale).t()
                parts.append(F.embedding(labels, rows) + self.embedding.bias)
            vectors: Tensor = self.layers(torch.cat([pixel_norm(part) for part in parts], dim=1))
        return vectors
