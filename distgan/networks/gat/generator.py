"""Generator of GAT (Hyun et al., "Scalable GANs with Transformers", ICML 2026): a transformer over patches.

Settings are those of the released code (hse1032/GAT, models/generator.py). Its embedding of an image of noise, which it
multiplies by 0, is left out. Weights start as there: Glorot's uniform, a tenth of it where styles enter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distgan.distributed import collectives
from distgan.networks.gat.layers import (
    LEVELS,
    Attention,
    GatedDense,
    Rotation,
    SlowDense,
    dense,
    fixed_positions,
    patches_per_side,
    root_mean_square_norm,
)
from distgan.networks.layers.equalized import pixel_norm
from distgan.networks.layers.stage import Stage
from distgan.networks.shape import SampleShape

_AVERAGE_DECAY = 0.995
_STYLE_GAIN = 0.1


class GATGenerator(nn.Module):
    """Latents (n, latent_size), and int64 labels (n,) if there are classes, to samples (n, C, R, R), unbounded.

    A mapping makes a style of a latent and its label. Tokens start as the fixed positions of patches; the style scales
    what enters each block and its output. After each quarter of the blocks a layer adds to the sample. In training mode
    the result is (n, 4 C, R, R), the sums after each quarter side by side, which `losses.level_noise` needs.

    Buffers:
        average_styles: (classes, width), the mean style of each class over training, with a decay of 0.995 per
            micro-batch of the generator's updates. It is over the samples of all ranks; in the released code each rank
            has its own.
    """

    levels = LEVELS
    style_truncation = 1.0
    """Weight of a style against the average style of its class in evaluation mode: 1 leaves styles as they are, and
    with 0 all samples of a class have its average. The released code's number is 1 less this one."""
    moving_buffers = ("average_styles",)

    def __init__(
        self,
        shape: SampleShape,
        latent_size: int,
        *,
        patch_size: int = 2,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        side = patches_per_side("generator", shape, patch_size, width, heads, depth)
        classes = max(1, shape.num_classes)
        self.patch_size, self.channels = patch_size, shape.channels
        self.embedding = nn.Embedding(classes, latent_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        # As the lowest stage, so that it is float32 wherever a stage is.
        self.mapping = Stage(1, SlowDense(2 * latent_size, width), nn.SiLU(), SlowDense(width, width))
        self.register_buffer("positions", fixed_positions(width, side), persistent=False)
        self.positions: Tensor
        self.rotation = Rotation(width // heads, side)
        self.blocks = nn.ModuleList(StyledBlock(width, heads) for _ in range(depth))
        self.to_sample = nn.ModuleList(ToPatches(width, patch_size**2 * shape.channels) for _ in range(LEVELS))
        self.register_buffer("average_styles", torch.zeros(classes, width))
        self.average_styles: Tensor

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        levels = self._levels(self._style(latents, labels))
        return torch.cat(levels, dim=1) if self.training else levels[-1]

    def styles(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the styles (n, 1, width)."""
        return self._style(latents, labels)[:, None]

    def synthesize(self, styles: Tensor, latents: Tensor) -> Tensor:
        """Return the samples (n, C, R, R) of `styles` (see there)."""
        return self._levels(styles[:, 0])[-1]

    def _style(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        classes = torch.zeros(len(latents), dtype=torch.int64, device=latents.device) if labels is None else labels
        style: Tensor = self.mapping(torch.cat((pixel_norm(self.embedding(classes)), pixel_norm(latents)), dim=1))
        if self.training and torch.is_grad_enabled():  # an update of the generator
            self._follow(style.detach(), classes)
        elif not self.training and self.style_truncation != 1.0:
            style = self.average_styles[classes].to(style.dtype).lerp(style, self.style_truncation)
        return style

    @torch.no_grad()
    def _follow(self, styles: Tensor, classes: Tensor) -> None:
        """Move the averages of the classes in the batch of all ranks. Collective."""
        averages = self.average_styles
        sums = torch.zeros_like(averages).index_add_(0, classes, styles.to(averages.dtype))
        counts = averages.new_zeros(len(averages)).index_add_(0, classes, averages.new_ones(len(classes)))
        total = collectives.all_reduce_sum(torch.cat((sums, counts[:, None]), dim=1))
        sums, counts = total[:, :-1], total[:, -1:]
        averages.copy_(torch.where(counts > 0, (sums / counts.clamp(min=1)).lerp(averages, _AVERAGE_DECAY), averages))

    def _levels(self, style: Tensor) -> list[Tensor]:
        """Return the sums after each quarter of the blocks, (n, C, R, R) each."""
        tokens = self.positions.to(style.dtype).expand(len(style), -1, -1)
        every, levels = len(self.blocks) // LEVELS, list[Tensor]()
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens, style, self.rotation)
            if number % every == 0:
                added = self._joined(self.to_sample[len(levels)](tokens, style))
                levels.append(levels[-1] + added if levels else added)
        return levels

    def _joined(self, patches: Tensor) -> Tensor:
        """Put patches (n, side^2, P^2 C) together, to (n, C, R, R)."""
        side, size = round(patches.shape[1] ** 0.5), self.patch_size
        grid = patches.view(len(patches), side, side, size, size, self.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), self.channels, side * size, side * size)


class StyledBlock(nn.Module):
    """x + g1 attention((1 + s1) norm x), then x + g2 dense((1 + s2) norm x), with scales and gates of the style."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.dense_norm = (root_mean_square_norm(width, scaled=False) for _ in range(2))
        self.attention, self.dense = Attention(width, heads), GatedDense(width)
        self.modulation = nn.Sequential(nn.SiLU(), dense(width, 4 * width, gain=_STYLE_GAIN))

    def forward(self, tokens: Tensor, style: Tensor, rotation: Rotation) -> Tensor:
        scale, gate, dense_scale, dense_gate = self.modulation(style)[:, None].chunk(4, dim=2)
        tokens = tokens + gate * self.attention(self.attention_norm(tokens) * (1 + scale), rotation)
        mixed: Tensor = tokens + dense_gate * self.dense(self.dense_norm(tokens) * (1 + dense_scale))
        return mixed


class ToPatches(nn.Module):
    """Tokens (n, tokens, width) to patches (n, tokens, size), scaled by the style."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.norm, self.output = root_mean_square_norm(width, scaled=False), dense(width, size)
        self.modulation = nn.Sequential(nn.SiLU(), dense(width, width, gain=_STYLE_GAIN))

    def forward(self, tokens: Tensor, style: Tensor) -> Tensor:
        patches: Tensor = self.output(self.norm(tokens) * (1 + self.modulation(style)[:, None]))
        return patches
