"""Dense networks for low-dimensional points.

The defaults are those of the toy experiments of Gulrajani et al. 2017 (released code, gan_toy.py), except for their
width of 512: three hidden layers, ReLU, linear outputs. Weights are uniform with variance 2 / inputs (He et al. 2015),
in the last layer with Glorot's 2 / (inputs + outputs). Biases are 0.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from distgan.config.architectures import MinibatchDiscriminationConfig
from distgan.networks.layers.labels import with_labels
from distgan.networks.layers.minibatch import build_minibatch_discrimination
from distgan.networks.layers.normalization import build_normalization, centers_channels
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.layers.virtual_batch_norm import add_reference
from distgan.networks.shape import SampleShape


class MLPGenerator(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to points (n, dimensions).

    Labels enter as a learned vector concatenated to the latents (Mirza and Osindero 2014).
    """

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        depth: int = 3,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        classes = shape.num_classes
        self.embedding = nn.Embedding(classes, latent_size) if classes else None
        self.layers = _hidden_layers(latent_size * (2 if classes else 1), width, depth, normalization)
        self.output = _last_layer(width, shape.dimensions)
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, (latent_size,), labeled=classes > 0)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        points: Tensor = self.output(self.layers(with_labels(latents, labels, self.embedding)))
        return points


class MLPDiscriminator(nn.Module):
    """Points (n, dimensions), and int64 labels (n,) if there are classes, to logits (n,).

    Labels enter as a learned vector concatenated to the points. Minibatch discrimination can compare samples by their
    last features.
    """

    feature_layer = "layers"

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        depth: int = 3,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
        minibatch_discrimination: MinibatchDiscriminationConfig | None = None,
    ) -> None:
        super().__init__()
        classes = shape.num_classes
        self.embedding = nn.Embedding(classes, shape.dimensions) if classes else None
        self.layers = _hidden_layers(shape.dimensions * (2 if classes else 1), width, depth, normalization)
        self.minibatch_discrimination, features = build_minibatch_discrimination(minibatch_discrimination, width)
        self.logit = _last_layer(features, 1)
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, shape.sizes, labeled=classes > 0)

    def forward(self, points: Tensor, labels: Tensor | None = None) -> Tensor:
        features = self.layers(with_labels(points, labels, self.embedding))
        logits: Tensor = self.logit(self.minibatch_discrimination(features)).squeeze(1)
        return logits


def _hidden_layers(inputs: int, width: int, depth: int, normalization: str) -> nn.Sequential:
    """Build `depth` times dense, normalization, ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs] + [width] * depth):
        dense = nn.Linear(before, after, bias=not centers_channels(normalization))
        nn.init.kaiming_uniform_(dense.weight, nonlinearity="relu")
        if dense.bias is not None:
            nn.init.zeros_(dense.bias)
        layers += [dense, build_normalization(normalization, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _last_layer(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
