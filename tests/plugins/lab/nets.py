"""Networks with self-attention (Zhang et al. 2019), for images of any size that is divisible by 4."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from distgan.networks.shape import SampleShape


class Attention(nn.Module):
    """x + gain * attention(x), with a gain that starts at 0."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return images + self.gain * mixed.transpose(1, 2).reshape(images.shape)


class Generator(nn.Module):
    """Latents (n, latent_size), and labels (n,) if there are classes, to images (n, C, R, R) in [-1, 1]."""

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        hidden: Annotated[int, Field(ge=8, le=4096)] = 64,
        heads: Annotated[int, Field(ge=1)] = 2,
    ) -> None:
        super().__init__()
        self.side = shape.resolution // 4
        self.embedding = nn.Embedding(shape.num_classes, latent_size) if shape.num_classes else None
        self.project = nn.Linear(latent_size, hidden * self.side**2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            Attention(hidden, heads),
            nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1),
            nn.BatchNorm2d(hidden // 2),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden // 2, shape.channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        if self.embedding is not None:
            latents = latents + self.embedding(labels)
        images: Tensor = self.layers(self.project(latents).unflatten(1, (-1, self.side, self.side)))
        return images


class Discriminator(nn.Module):
    """Images (n, C, R, R), and labels (n,) if there are classes, to logits (n,)."""

    feature_layer = "features"

    def __init__(self, shape: SampleShape, *, hidden: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        convolution = nn.utils.parametrizations.spectral_norm(nn.Conv2d(hidden, hidden, 4, stride=2, padding=1))
        self.features = nn.Sequential(
            nn.Conv2d(shape.channels, hidden, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            convolution,
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Flatten(),
        )
        self.features[0].bias.requires_grad_(False)  # a frozen parameter
        self.logit = nn.Linear(hidden * (shape.resolution // 4) ** 2, max(1, shape.num_classes))

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        logits: Tensor = self.logit(self.features(images))
        return logits.squeeze(1) if labels is None else logits.gather(1, labels[:, None]).squeeze(1)
