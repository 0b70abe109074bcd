"""Networks that grow while they train (Karras et al., "Progressive Growing of GANs", ICLR 2018; released code).

They start at 4x4 pixels and double; level `l` has 4 << l pixels per side. A new level is faded in. The generator's
image is a blend of the new output and the enlarged old one. The discriminator's activations are a blend of those of the
new block and those of the old input. The parameters of all levels exist from the start, so the names in a checkpoint do
not depend on the level.

The paper's widths, min(8192 / 2^s, 512) at 2^(s + 1) pixels per side, are `max_width: 512` and `width: 16384 / R` for
R pixels: 16 for 1024, 64 for 256, 512 for 32. Its latents are 512 normal numbers. Its group size of the minibatch
standard deviation is 16 (4 in later work).

Labels: a learned vector is concatenated to the generator's latents (Mirza and Osindero 2014). The discriminator has one
logit per class and returns that of the sample's class (Mescheder et al. 2018).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.config.architectures import MinibatchStddevConfig
from distgan.networks.layers.equalized import EqualizedConv2d, EqualizedLinear, PixelNorm, pixel_norm
from distgan.networks.layers.labels import with_labels
from distgan.networks.layers.minibatch import MinibatchStddev
from distgan.networks.shape import SampleShape
from distgan.schedule import Growth


class GrowingNetwork(nn.Module, ABC):
    """Growth state of a network: its level and fade, and the parameters that they involve."""

    def __init__(self, shape: SampleShape, width: int, max_width: int) -> None:
        super().__init__()
        self.top_level = shape.resolution.bit_length() - 3
        self.widths = [min(width << self.top_level - level, max_width) for level in self.levels]
        self.level = self.top_level
        self.fading = False
        # A tensor, so that a new value does not recompile a compiled network. It starts on the CPU, because no file
        # has a value for it, which a network on the meta device would need.
        self.register_buffer("fade", torch.ones((), device="cpu"), persistent=False)
        self.fade: Tensor

    @property
    def levels(self) -> range:
        """Number of levels."""
        return range(self.top_level + 1)

    def set_growth(self, level: int, fade: float) -> None:
        """Set the level (in doublings from 4x4) and its weight `fade` in (0, 1] in the blend; 1 shows it alone.

        The lowest level is not faded in.
        """
        assert level in self.levels, level
        assert 0.0 < fade <= 1.0, fade
        self.level = level
        self.fading = fade < 1.0 and level > 0
        self.fade.fill_(fade)

    @abstractmethod
    def active_modules(self) -> list[nn.Module]:
        """Return the layers in use at the current level and fade."""

    def active_parameters(self) -> list[nn.Parameter]:
        """Return the parameters in use at the current level and fade. The others get no gradient."""
        return [parameter for module in self.active_modules() for parameter in module.parameters()]

    def _ends(self, layers: nn.ModuleList) -> list[nn.Module]:
        """Return the layers between pixels and channels in use: the current level's, and while fading the previous."""
        return list(layers[self.level - self.fading : self.level + 1])


class ProgressiveGenerator(GrowingNetwork):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to images (n, C, r, r), r = 4 << level.

    Outputs are linear: trained toward [-1, 1], but not bounded (appendix A.1). In evaluation mode images are enlarged
    to the full resolution, so pictures, metrics and exports have the same size at every level.
    """

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        max_width: int = 1024,
        normalization: str = "none",
    ) -> None:
        super().__init__(shape, width, max_width)
        assert normalization == "none"
        classes = shape.num_classes
        self.embedding = nn.Embedding(classes, latent_size) if classes else None
        first = self.widths[0]
        self.first = nn.Sequential(
            # Applied to one pixel: the released code's dense layer to 4x4, with its gain of sqrt(2)/4.
            EqualizedConv2d(latent_size * (2 if classes else 1), first, 4, padding=3),
            *_rectified_and_normalized(),
            EqualizedConv2d(first, first, 3, padding=1),
            *_rectified_and_normalized(),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                EqualizedConv2d(before, after, 3, padding=1),
                *_rectified_and_normalized(),
                EqualizedConv2d(after, after, 3, padding=1),
                *_rectified_and_normalized(),
            )
            for before, after in itertools.pairwise(self.widths)
        )
        self.to_rgb = nn.ModuleList(EqualizedConv2d(width, shape.channels, 1, gain=1.0) for width in self.widths)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        latents = pixel_norm(with_labels(latents, labels, self.embedding))
        before = activations = self.first(latents[:, :, None, None])
        for block in self.blocks[: self.level]:
            before, activations = activations, block(activations)
        images: Tensor = self.to_rgb[self.level](activations)
        if self.fading:
            images = blend(enlarge(self.to_rgb[self.level - 1](before)), images, self.fade)
        return images if self.training else enlarge(images, 2 ** (self.top_level - self.level))

    def active_modules(self) -> list[nn.Module]:
        """The layers that take part at the present level and fade."""
        embedding = [self.embedding] if self.embedding is not None else []
        return [*embedding, self.first, *self.blocks[: self.level], *self._ends(self.to_rgb)]


class ProgressiveDiscriminator(GrowingNetwork):
    """Images (n, C, r, r), r = 4 << level, and int64 labels (n,) if there are classes, to logits (n,)."""

    feature_layer = "last"

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        max_width: int = 1024,
        normalization: str = "none",
        minibatch_stddev: MinibatchStddevConfig | None = None,
    ) -> None:
        super().__init__(shape, width, max_width)
        assert normalization == "none"
        self.from_rgb = nn.ModuleList(
            nn.Sequential(EqualizedConv2d(shape.channels, width, 1), _rectifier()) for width in self.widths
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                EqualizedConv2d(after, after, 3, padding=1),
                _rectifier(),
                EqualizedConv2d(after, before, 3, padding=1),
                _rectifier(),
                nn.AvgPool2d(2),
            )
            for before, after in itertools.pairwise(self.widths)
        )
        lowest, compared = self.widths[0], minibatch_stddev
        self.last = nn.Sequential(
            MinibatchStddev(compared.group_size) if compared else nn.Identity(),
            EqualizedConv2d(lowest + bool(compared), lowest, 3, padding=1),
            _rectifier(),
            EqualizedConv2d(lowest, lowest, 4),
            _rectifier(),
            nn.Flatten(),
        )
        self.logits = EqualizedLinear(lowest, max(1, shape.num_classes), gain=1.0)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        activations = self.from_rgb[self.level](images)
        for level in range(self.level, 0, -1):
            activations = self.blocks[level - 1](activations)
            if self.fading and level == self.level:
                old = self.from_rgb[level - 1](shrink(images, 4 << level - 1))
                activations = blend(old, activations, self.fade)
        logits: Tensor = self.logits(self.last(activations))
        if labels is None:
            return logits.squeeze(1)
        return logits.gather(1, labels[:, None]).squeeze(1)

    def active_modules(self) -> list[nn.Module]:
        """The layers that take part at the present level and fade."""
        return [*self._ends(self.from_rgb), *self.blocks[: self.level], self.last, self.logits]


def blend(old: Tensor, new: Tensor, fade: Tensor | float) -> Tensor:
    """(1 - fade) old + fade new, in the dtype of old and new."""
    return old + fade * (new - old)


def enlarge(images: Tensor, factor: int = 2) -> Tensor:
    """Enlarge images (n, C, r, r) to (n, C, factor r, factor r) by repeating pixels."""
    return F.interpolate(images, scale_factor=factor, mode="nearest")


def shrink(images: Tensor, resolution: int) -> Tensor:
    """Shrink images (n, C, r, r) by a power of two to (n, C, resolution, resolution), with means of pixel boxes."""
    return F.avg_pool2d(images, images.shape[-1] // resolution)


def fade_reals(images: Tensor, fade: Tensor | float) -> Tensor:
    """Blur real images (n, C, r, r) for a level that is faded in, as much as generated ones (section 2)."""
    return blend(enlarge(shrink(images, images.shape[-1] // 2)), images, fade)


def _rectifier() -> nn.Module:
    return nn.LeakyReLU(0.2, inplace=True)


def _rectified_and_normalized() -> tuple[nn.Module, nn.Module]:
    return _rectifier(), PixelNorm()


def set_growth(networks: Iterable[nn.Module], growth: Growth | None) -> None:
    """Set the level and fade of growing networks; None leaves them at full resolution."""
    for network in networks:
        if growth is not None:
            assert isinstance(network, GrowingNetwork)
            network.set_growth(growth.level, growth.fade)
