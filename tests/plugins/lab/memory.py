"""A discriminator whose device has memory for few samples."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from distgan.networks.shape import SampleShape


class Discriminator(nn.Module):
    """Images (n, C, R, R) to logits (n,), for at most `limit` samples in a pass.

    Args:
        rank: the only rank with this limit; None for all ranks.
        passes: number of passes that have no limit.
    """

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int,
        limit: int,
        rank: int | None = None,
        passes: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers = nn.Conv2d(shape.channels, width, 4, stride=4), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Flatten()
        self.blocks = nn.ModuleList([nn.Sequential(*layers)])
        self.logit = nn.Linear(width * (shape.resolution // 4) ** 2, 1)
        self.limit = limit if rank in (None, int(os.environ.get("RANK", "0"))) else 2**20
        self.passes = passes

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        self.passes -= 1
        if self.passes < 0 and len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        logits: Tensor = self.logit(self.blocks[0](images))
        return logits.squeeze(1)
