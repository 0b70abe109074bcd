"""R3GAN (Huang, Gokaslan, Kuleshov, Tompkin, "The GAN is dead; long live the GAN!", NeurIPS 2024, section 4, config E).

Both networks are stages of residual blocks from 4x4 to full resolution (or back), without normalization. A block has a
1x1 convolution that doubles the channels, a grouped 3x3 one, and a 1x1 one back. Only activations have biases.
Between stages the image is resampled with the filter [1, 3, 3, 1], which the released code derives from [1, 2, 1] to
keep the grid centered. Where widths differ, a 1x1 convolution follows. Weights start as in Fixup (Zhang et al. 2019),
so each block starts as the identity.

Label embeddings start as in the released code, whose dense layer on one-hot labels draws them with the variance of its
fan-in: N(0, 1/classes) in the generator and N(0, 1/(classes width)) in the discriminator (R3GAN/Networks.py:141,163).

The paper trains them with relativistic pairing, R1 and R2, and Adam with beta1 = 0. The released code moves gamma,
beta2, the learning rate, the half-life of the EMA and the probability of augmentation along half a cosine: see the
recipes cifar10-r3gan, ffhq64-r3gan, ffhq256-r3gan, imagenet32-r3gan and imagenet64-r3gan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.layers.labels import with_labels
from distgan.networks.layers.resampling import Downsample, Upsample
from distgan.networks.layers.stage import Stage
from distgan.networks.shape import SampleShape

_SLOPE = 0.2
_EXPANSION = 2


class R3GANGenerator(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to images (n, C, R, R), unbounded.

    Labels enter as a learned vector concatenated to the latents.
    """

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        max_width: int = 1024,
        depth: int = 2,
        group_width: int = 16,
        normalization: str = "none",
    ) -> None:
        super().__init__()
        assert normalization == "none"
        widths = _stage_widths("generator", shape, width, max_width, group_width)[::-1]
        gain = _fixup_gain(depth * len(widths))
        self.embedding = _embedding(shape.num_classes, latent_size, 1) if shape.num_classes else None
        first: list[nn.Module] = [Basis(latent_size * (2 if shape.num_classes else 1), widths[0])]
        self.stages = nn.Sequential()
        for level, after in enumerate(widths):
            layers = [*_match(widths[level - 1], after), Upsample()] if level else first
            blocks = [ResidualBlock(after, gain, group_width) for _ in range(depth)]
            self.stages.append(Stage(4 << level, *layers, *blocks))
        self.to_image = _convolution(widths[-1], shape.channels, 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The stages, which can be sharded, compiled and recomputed one by one."""
        return list(self.stages)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.to_image(self.stages(with_labels(latents, labels, self.embedding)))
        return images


class R3GANDiscriminator(nn.Module):
    """Images (n, C, R, R), and int64 labels (n,) if there are classes, to logits (n,).

    With classes the last layer outputs a vector; the logit is its product with the label's embedding.
    """

    feature_layer = "features"

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        max_width: int = 1024,
        depth: int = 2,
        group_width: int = 16,
        normalization: str = "none",
    ) -> None:
        super().__init__()
        assert normalization == "none"
        widths = _stage_widths("discriminator", shape, width, max_width, group_width)
        gain = _fixup_gain(depth * len(widths))
        layers: list[nn.Module] = [_convolution(shape.channels, widths[0], 1)]
        self.stages = nn.Sequential()
        for level, before in enumerate(widths):
            layers += [ResidualBlock(before, gain, group_width) for _ in range(depth)]
            if level + 1 < len(widths):
                layers += [Downsample(), *_match(before, widths[level + 1])]
            self.stages.append(Stage(shape.resolution >> level, *layers))
            layers = []
        self.features = Stage(4, _convolution(widths[-1], widths[-1], 4, groups=widths[-1]), nn.Flatten())
        self.embedding = _embedding(shape.num_classes, widths[-1], widths[-1]) if shape.num_classes else None
        self.logit = Stage(4, _linear(widths[-1], widths[-1] if shape.num_classes else 1))

    @property
    def blocks(self) -> list[nn.Module]:
        """The stages, which can be sharded, compiled and recomputed one by one."""
        return list(self.stages)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.logit(self.features(self.stages(images)))
        if self.embedding is not None:
            assert labels is not None
            logits = (logits * self.embedding(labels)).sum(1, keepdim=True)
        return logits.squeeze(1)


class Basis(nn.Module):
    """Vectors (n, size) to activations (n, channels, 4, 4): a learned 4x4 image per channel, times a learned scale."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.images = nn.Parameter(torch.randn(channels, 4, 4))
        self.scale = _linear(size, channels)

    def forward(self, vectors: Tensor) -> Tensor:
        scale: Tensor = self.scale(vectors)[:, :, None, None]
        return self.images.to(scale.dtype) * scale


class ResidualBlock(nn.Module):
    """x + W3 a(W2 a(W1 x)), where a adds a channel bias and applies LeakyReLU(0.2); W3 starts at 0."""

    def __init__(self, channels: int, gain: float, group_width: int = 16) -> None:
        super().__init__()
        expanded = channels * _EXPANSION
        self.layers = nn.Sequential(
            _convolution(channels, expanded, 1, gain=gain),
            BiasedActivation(expanded),
            _convolution(expanded, expanded, 3, gain=gain, padding=1, groups=expanded // group_width),
            BiasedActivation(expanded),
            _convolution(expanded, channels, 1, gain=0.0),
        )

    def forward(self, activations: Tensor) -> Tensor:
        out: Tensor = activations + self.layers(activations)
        return out


class BiasedActivation(nn.Module):
    """LeakyReLU(0.2) of each channel plus its learned bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, activations: Tensor) -> Tensor:
        return F.leaky_relu(activations + self.bias[:, None, None].to(activations.dtype), _SLOPE)


def _stage_widths(role: str, shape: SampleShape, width: int, max_width: int, group_width: int) -> list[int]:
    """Channels at R, R/2, ..., 4."""
    if shape.resolution < 8:
        raise UserError(
            f"data.resolution = {shape.resolution}: the r3gan {role} supports powers of two from 8 up; set one of these"
        )
    widths = [min(width << stage, max_width) for stage in range(shape.resolution.bit_length() - 2)]
    if odd := [channels for channels in widths if channels * _EXPANSION % group_width]:
        raise UserError(
            f"{role}.group_width = {group_width}: does not divide {_EXPANSION * odd[0]}, twice the channels of a stage "
            f"of the r3gan {role}; change it, {role}.width = {width} or {role}.max_width = {max_width}"
        )
    return widths


def _fixup_gain(blocks: int) -> float:
    """Standard deviation, times root fan-in, of the first two of a block's three convolutions: L^(-1/(2m - 2)), m = 3
    layers, times that which keeps the variance through LeakyReLU."""
    return math.sqrt(2.0 / (1.0 + _SLOPE**2)) / math.sqrt(math.sqrt(blocks))


def _embedding(classes: int, size: int, shrunk: int) -> nn.Embedding:
    """Label vectors from N(0, 1/(classes shrunk))."""
    layer = nn.Embedding(classes, size)
    nn.init.normal_(layer.weight, std=1.0 / math.sqrt(classes * shrunk))
    return layer


def _match(before: int, after: int) -> Sequence[nn.Module]:
    return [_convolution(before, after, 1)] if before != after else []


def _convolution(
    before: int, after: int, kernel: int, *, gain: float = 1.0, padding: int = 0, groups: int = 1
) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, kernel, padding=padding, groups=groups, bias=False)
    _initialize(layer, gain)
    return layer


def _linear(before: int, after: int) -> nn.Linear:
    layer = nn.Linear(before, after, bias=False)
    _initialize(layer)
    return layer


def _initialize(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
