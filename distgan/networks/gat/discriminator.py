"""Discriminator of GAT (Hyun et al. 2026): a transformer over patches of all levels side by side.

Settings are those of the released code (hse1032/GAT, models/discriminator.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
from distgan.networks.layers.stage import Stage
from distgan.networks.shape import SampleShape

_LAYER_SCALE = 0.1
_PROJECTOR_WIDTH = 2048


class GATDiscriminator(nn.Module):
    """Samples of 4 levels (n, 4 C, R, R), and int64 labels (n,) if there are classes, to logits (n,).

    Samples (n, C, R, R) stand for all levels.

    A class token and the patches pass through blocks; the logit is the product of two vectors, of the class token and
    of the label. It has no kinks, so that penalties may be finite differences. With an `alignment_size`, the layer
    `projector` maps tokens to vectors (n, 1 + patches, alignment_size), the class token first, for
    `objective.alignment`.
    """

    feature_layer = "head"

    def __init__(
        self,
        shape: SampleShape,
        *,
        patch_size: int = 2,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        projection_size: int = 2048,
        alignment_size: int | None = None,
    ) -> None:
        super().__init__()
        side = patches_per_side("discriminator", shape, patch_size, width, heads, depth)
        self.embed = nn.Conv2d(LEVELS * shape.channels, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.embed.weight.view(width, -1))
        nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]
        self.register_buffer("positions", fixed_positions(width, side), persistent=False)
        self.positions: Tensor
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.rotation = Rotation(width // heads, side)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        # The lowest stages, so that they are float32 wherever a stage is: a finite difference divides their rounding.
        self.head = Stage(1, root_mean_square_norm(width, scaled=True), dense(width, projection_size))
        self.embedding = nn.Embedding(max(1, shape.num_classes), projection_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.label_mapping = Stage(
            1, SlowDense(projection_size, projection_size), nn.SiLU(), SlowDense(projection_size, projection_size)
        )
        self.projector: nn.Sequential | None = None
        if alignment_size is not None:
            self.projector = nn.Sequential(
                dense(width, _PROJECTOR_WIDTH), nn.SiLU(),
                dense(_PROJECTOR_WIDTH, _PROJECTOR_WIDTH), nn.SiLU(),
                dense(_PROJECTOR_WIDTH, alignment_size),
            )  # fmt: skip

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        if samples.shape[1] < self.embed.in_channels:
            samples = samples.repeat(1, LEVELS, 1, 1)
        patches = self.embed(samples).flatten(2).transpose(1, 2)
        patches = patches + self.positions.to(patches.dtype)
        token = self.class_token.to(patches.dtype).expand(len(patches), -1, -1)
        tokens = torch.cat((token, patches), dim=1)
        for block in self.blocks:
            tokens = block(tokens, self.rotation)
        if self.projector is not None:
            self.projector(tokens)
        classes = torch.zeros(len(samples), dtype=torch.int64, device=samples.device) if labels is None else labels
        logits: Tensor = (self.head(tokens[:, 0]) * self.label_mapping(self.embedding(classes))).sum(1)
        return logits


class Block(nn.Module):
    """x + a attention(norm x), then x + b dense(norm x), with learned scales a and b (Touvron et al. 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.dense_norm = (root_mean_square_norm(width, scaled=True) for _ in range(2))
        self.attention, self.dense = Attention(width, heads), GatedDense(width)
        self.attention_scale, self.dense_scale = (nn.Parameter(torch.full((width,), _LAYER_SCALE)) for _ in range(2))

    def forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens), rotation) * self.attention_scale
        mixed: Tensor = tokens + self.dense(self.dense_norm(tokens)) * self.dense_scale
        return mixed
