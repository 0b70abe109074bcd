"""Character networks (Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville, "Improved Training of Wasserstein GANs", 2017).

As in the released code (`gan_language.py`), both networks are residual blocks of one-dimensional convolutions at full
length, without normalization. The generator ends in a softmax over the vocabulary at each position. The critic's input
is these probabilities, or one-hot vectors of real text. Initial weights are uniform, with variance
4 / (fan in + fan out) in convolutions and 2 / (fan in + fan out) in dense layers. Biases start at 0.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.shape import SampleShape

_KERNEL = 5
_SCALE = 0.3


class CharacterGenerator(nn.Module):
    """Latents (n, latent_size) to text (n, vocabulary, length): character probabilities at each position."""

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        depth: int = 5,
        normalization: str = "none",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        assert normalization == "none"
        _check("generator", shape)
        self.projection = nn.Linear(latent_size, width * shape.length)
        self.expand = nn.Unflatten(1, (width, shape.length))
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.characters = nn.Conv1d(width, shape.vocabulary, 1)
        self.softmax = nn.Softmax(dim=1)
        self.apply(initialize)
        if spectral_norm:
            add_spectral_norm(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        text: Tensor = self.softmax(self.characters(self.blocks(self.expand(self.projection(latents)))))
        return text


class CharacterDiscriminator(nn.Module):
    """Text (n, vocabulary, length) to logits (n,)."""

    feature_layer = "blocks"

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        depth: int = 5,
        normalization: str = "none",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        assert normalization == "none"
        _check("discriminator", shape)
        self.characters = nn.Conv1d(shape.vocabulary, width, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.logit = nn.Linear(width * shape.length, 1)
        self.apply(initialize)
        if spectral_norm:
            add_spectral_norm(self)

    def forward(self, text: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.logit(self.blocks(self.characters(text)).flatten(1)).squeeze(1)
        return logits


class ResidualBlock(nn.Module):
    """x + 0.3 f(x), where f is ReLU and a length-preserving convolution of width 5, twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2),
        )

    def forward(self, features: Tensor) -> Tensor:
        change: Tensor = self.layers(features)
        return features + _SCALE * change


def initialize(module: nn.Module) -> None:
    """Set the uniform weights of the released code; set biases to 0."""
    if isinstance(module, (nn.Conv1d, nn.Linear)):
        gain = math.sqrt(2.0) if isinstance(module, nn.Conv1d) else 1.0
        nn.init.xavier_uniform_(module.weight, gain)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _check(role: str, shape: SampleShape) -> None:
    if shape.num_classes:
        raise UserError(f"data.labels = true: the characters {role} is unconditional; set data.labels=false")
