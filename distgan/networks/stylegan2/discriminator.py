"""StyleGAN2's discriminator (Karras et al. 2020, section 4.1; conditional: Karras et al. 2020b, appendix C)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from distgan.config.architectures import MinibatchStddevConfig
from distgan.distributed.collectives import at_least_float32
from distgan.networks.layers.equalized import EqualizedConv2d, EqualizedLinear, ScaledLeakyReLU
from distgan.networks.layers.minibatch import MinibatchStddev
from distgan.networks.layers.resampling import Downsample, blur
from distgan.networks.shape import SampleShape
from distgan.networks.stylegan2.mapping import Mapping
from distgan.networks.stylegan2.widths import widths_from_images

_LABEL_LAYERS = 8


class StyleGAN2Discriminator(nn.Module):
    """Images (n, C, R, R), and int64 labels (n,) if there are classes, to logits (n,).

    With classes the last layer outputs a vector of length d; the logit is its product with the mapped label, divided by
    sqrt(d). The layers at 4x4 pixels are float32 under autocast too, as in the released code.
    """

    feature_layer = "features"

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        max_width: int = 512,
        residual: bool = True,
        minibatch_stddev: MinibatchStddevConfig | None = None,
    ) -> None:
        super().__init__()
        widths = widths_from_images("discriminator", shape, width, max_width)
        lowest = widths[-1]
        self.from_image = nn.Sequential(EqualizedConv2d(shape.channels, widths[0], 1, gain=1.0), ScaledLeakyReLU())
        self.blocks = nn.Sequential(*(Block(before, after, residual) for before, after in pairwise(widths)))
        compared = [MinibatchStddev(minibatch_stddev.group_size)] if minibatch_stddev is not None else []
        self.features = nn.Sequential(
            *compared,
            EqualizedConv2d(lowest + len(compared), lowest, 3, padding=1, gain=1.0),
            ScaledLeakyReLU(),
            nn.Flatten(),
            EqualizedLinear(16 * lowest, lowest, gain=1.0),
            ScaledLeakyReLU(),
        )
        self.logit = EqualizedLinear(lowest, lowest if shape.num_classes else 1, gain=1.0)
        self.mapping = Mapping(0, shape.num_classes, lowest, _LABEL_LAYERS) if shape.num_classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        activations = self.blocks(self.from_image(images))
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.logit(self.features(at_least_float32(activations)))
        if self.mapping is not None:
            logits = (logits * self.mapping(None, labels)).sum(1, keepdim=True) / math.sqrt(logits.shape[1])
        return logits.squeeze(1)


class Block(nn.Module):
    """Two 3x3 convolutions and half the size: (n, before, H, W) to (n, after, H/2, W/2).

    A residual block adds a 1x1 convolution of its input, and halves the variance of the sum. The image is filtered with
    [1, 3, 3, 1] before the strided convolution.
    """

    def __init__(self, before: int, after: int, residual: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(EqualizedConv2d(before, before, 3, padding=1, gain=1.0), ScaledLeakyReLU())
        self.second = nn.Sequential(EqualizedConv2d(before, after, 3, stride=2, gain=1.0), ScaledLeakyReLU())
        self.skip = None
        if residual:
            self.skip = nn.Sequential(Downsample(), EqualizedConv2d(before, after, 1, gain=1.0, bias=False))

    def forward(self, activations: Tensor) -> Tensor:
        out: Tensor = self.second(blur(self.first(activations), padding=2))
        return out if self.skip is None else (out + self.skip(activations)) * math.sqrt(0.5)
