"""StyleGAN2's generator (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020).

The paper's widths, min(base / r, 512) at r pixels, are `max_width: 512` and `width: base / R` for R pixels. Released
presets have a base of 16384 for 256 pixels and of 32768 for CIFAR-10 and 1024.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from distgan.distributed import collectives
from distgan.networks.layers.resampling import Upsample
from distgan.networks.shape import SampleShape
from distgan.networks.stylegan2.mapping import Mapping
from distgan.networks.stylegan2.modulation import StyledLayer, ToImage
from distgan.networks.stylegan2.noise import AddressedNoise, draw_mixing
from distgan.networks.stylegan2.widths import widths_from_images

_AVERAGE_DECAY = 0.995


class StyleGAN2Generator(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to images (n, C, R, R), unbounded.

    A mapping network makes a style of each latent. The synthesis network starts from a learned 4x4 image and doubles
    it; the style scales the input channels of every convolution. Images are the sum of the outputs at all resolutions
    (skip connections, section 4.1).

    A sample's noise is a function of its latent: see `noise`. In training mode a sample has, with the probability
    `style_mixing`, the styles of a second latent from a random layer on (Karras et al. 2019, section 3.1). The second
    latent N(0, 1), the layer and whether there is one are functions of the first. The released code has one layer for
    all samples of a process, which makes batches depend on the number of processes.

    Buffers:
        average_style: (style_size,), the mean style over training with a decay of 0.995 per forward pass, toward which
            `style_truncation` moves. It is over the samples of all ranks; in the released code each rank has its own.
        path_length: (), the mean path length; see `losses.path_length`.
    """

    style_truncation = 1.0
    """Weight of a style against the average style in evaluation mode, psi in the paper (Karras et al. 2019, appendix
    B): 1 leaves styles as they are, and with 0 all samples have the average. `load_generator` sets it."""
    moving_buffers = ("average_style", "path_length")

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        width: int = 64,
        max_width: int = 512,
        style_size: int = 512,
        mapping_layers: int = 8,
        style_mixing: float = 0.9,
    ) -> None:
        super().__init__()
        widths = widths_from_images("generator", shape, width, max_width)[::-1]
        self.style_mixing = style_mixing
        self.num_styles = 2 * len(widths)
        self.mapping = Mapping(latent_size, shape.num_classes, style_size, mapping_layers)
        self.first = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.layers = nn.ModuleList([StyledLayer(widths[0], widths[0], style_size)])
        self.to_image = nn.ModuleList(ToImage(channels, shape.channels, style_size) for channels in widths)
        for before, after in pairwise(widths):
            self.layers.append(StyledLayer(before, after, style_size, upsample=True))
            self.layers.append(StyledLayer(after, after, style_size))
        self.noise = AddressedNoise([4 << (number + 1) // 2 for number in range(len(self.layers))])
        self.upsample = Upsample()
        self.register_buffer("average_style", torch.zeros(style_size))
        self.register_buffer("path_length", torch.zeros(()))
        self.average_style: Tensor
        self.path_length: Tensor

    @property
    def blocks(self) -> list[nn.Module]:
        """The styled layers, which can be sharded, compiled and recomputed one by one."""
        return list(self.layers)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.synthesize(self.styles(latents, labels), latents)

    def styles(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the styles of all layers, (n, num_styles, style_size). Collective in training mode."""
        style = self.mapping(latents, labels)
        styles: Tensor = style[:, None].expand(-1, self.num_styles, -1)
        if self.training:
            with torch.no_grad():
                mean = collectives.all_reduce_mean(style.mean(0))
                self.average_style.copy_(mean.lerp(self.average_style, _AVERAGE_DECAY))
            if self.style_mixing:
                second, replaced = draw_mixing(latents, self.num_styles, self.style_mixing)
                styles = torch.where(replaced[:, :, None], self.mapping(second, labels)[:, None], styles)
        elif self.style_truncation != 1.0:
            styles = self.average_style.lerp(styles, self.style_truncation)
        return styles

    def synthesize(self, styles: Tensor, latents: Tensor) -> Tensor:
        """Return the images of `styles` (see there). The latents only address the noise."""
        noise = self.noise(latents)
        activations = self.layers[0](self.first.expand(styles.shape[0], -1, -1, -1), styles[:, 0], noise[0])
        images: Tensor = self.to_image[0](activations, styles[:, 1])
        for level, to_image in enumerate(self.to_image[1:], 1):
            for number in (2 * level - 1, 2 * level):
                activations = self.layers[number](activations, styles[:, number], noise[number])
            with torch.autocast(images.device.type, enabled=False):
                images = self.upsample(images)
            # The style of the next resolution's first convolution, as in the released code.
            images = images + to_image(activations, styles[:, 2 * level + 1])
        return images
