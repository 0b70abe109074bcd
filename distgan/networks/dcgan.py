"""DCGAN (Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional GANs", ICLR 2016).

The paper's guidelines: strided convolutions instead of pooling, no hidden fully connected layers, batch norm except at
the generator's output and the discriminator's input, ReLU in the generator and LeakyReLU(0.2) in the discriminator,
tanh at the output, weights from N(0, 0.02). Kernels are 4x4 with padding 1, as in the authors' Torch code. Other
normalizations replace batch norm at the same places.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from distgan.config.architectures import MinibatchDiscriminationConfig, MinibatchStddevConfig
from distgan.errors import UserError
from distgan.networks.layers.labels import with_labels
from distgan.networks.layers.minibatch import MinibatchStddev, build_minibatch_discrimination
from distgan.networks.layers.normalization import build_normalization, centers_channels
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.layers.virtual_batch_norm import add_reference
from distgan.networks.shape import SampleShape


def hidden_widths(resolution: int, width: int, max_width: int) -> list[int]:
    """Channels at resolution/2, resolution/4, ..., 4: doubling from `width` up to `max_width`."""
    stages = resolution.bit_length() - 3
    return [min(width << stage, max_width) for stage in range(stages)]


class DCGANGenerator(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to images (n, C, R, R) in [-1, 1].

    Labels enter as a learned vector concatenated to the latents (Mirza and Osindero 2014).
    """

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        max_width: int = 1024,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_resolution("generator", shape)
        widths = hidden_widths(shape.resolution, width, max_width)[::-1]
        num_classes = shape.num_classes
        bias = not centers_channels(normalization)
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        self.projection = nn.Linear(latent_size * (2 if num_classes else 1), widths[0] * 16, bias=bias)
        layers: list[nn.Module] = [build_normalization(normalization, widths[0]), nn.ReLU(inplace=True)]
        for before, after in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=bias),
                build_normalization(normalization, after),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(widths[-1], shape.channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(initialize)
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, (latent_size,), labeled=num_classes > 0)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        latents = with_labels(latents, labels, self.embedding)
        images: Tensor = self.layers(self.projection(latents).unflatten(1, (-1, 4, 4)))
        return images


class DCGANDiscriminator(nn.Module):
    """Images (n, C, R, R), and int64 labels (n,) if there are classes, to logits (n,).

    Labels enter as a learned plane, one more channel of the input. Two optional layers compare samples by their last
    features: minibatch standard deviation adds a channel, then minibatch discrimination adds features.
    """

    feature_layer = "layers"

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        max_width: int = 1024,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
        minibatch_discrimination: MinibatchDiscriminationConfig | None = None,
        minibatch_stddev: MinibatchStddevConfig | None = None,
    ) -> None:
        super().__init__()
        _check_resolution("discriminator", shape)
        widths = hidden_widths(shape.resolution, width, max_width)
        num_classes = shape.num_classes
        bias = not centers_channels(normalization)
        self.resolution = shape.resolution
        self.embedding = nn.Embedding(num_classes, shape.resolution * shape.resolution) if num_classes else None
        layers: list[nn.Module] = [
            nn.Conv2d(shape.channels + bool(num_classes), widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 4, stride=2, padding=1, bias=bias),
                build_normalization(normalization, after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers)
        self.minibatch_stddev = MinibatchStddev(minibatch_stddev.group_size) if minibatch_stddev else nn.Identity()
        self.minibatch_discrimination, features = build_minibatch_discrimination(
            minibatch_discrimination, (widths[-1] + bool(minibatch_stddev)) * 16
        )
        self.logit = nn.Linear(features, 1)
        for part in (self.layers, self.logit):
            part.apply(initialize)
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, shape.sizes, labeled=num_classes > 0)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            assert labels is not None
            plane = self.embedding(labels).view(-1, 1, self.resolution, self.resolution)
            images = torch.cat((images, plane.to(images.dtype)), dim=1)
        features = self.minibatch_stddev(self.layers(images)).flatten(1)
        logits: Tensor = self.logit(self.minibatch_discrimination(features)).squeeze(1)
        return logits


def initialize(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02), set biases to 0 (section 4); embeddings keep N(0, 1), the scale of latents."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_resolution(role: str, shape: SampleShape) -> None:
    if not 16 <= shape.resolution <= 256:
        raise UserError(
            f"data.resolution = {shape.resolution}: the dcgan {role} supports powers of two from 16 to 256; "
            "set one of these; images are resized to it"
        )
