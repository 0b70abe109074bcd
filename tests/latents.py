"""Small shards of latents whose statistics are known."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.data.index.build import index_shards
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index
from distgan.data.kinds import npy_file
from tests.shards import write_tar

CHANNELS, SIDE = 2, 8


def moments(count: int, seed: int = 0, *, flips: bool = False) -> list[np.ndarray]:
    """Moments of `count` images: float32 (2 CHANNELS, SIDE, SIDE), with flips (2, 2 CHANNELS, SIDE, SIDE)."""
    random = np.random.default_rng(seed)
    means = random.normal([[[1.0]], [[-3.0]]], [[[2.0]], [[0.5]]], (count, CHANNELS, SIDE, SIDE))
    whole = np.concatenate([means, random.uniform(-3, 0, means.shape)], axis=1).astype(np.float32)
    # Those of the mirror image are another array, as an autoencoder that is not symmetric makes them.
    return [np.stack([one, one[..., ::-1] + 0.25]) if flips else one for one in whole]


def latent_shards(
    folder: Path,
    arrays: Sequence[np.ndarray | bytes],
    *,
    extension: str = "moments.npy",
    classes: int = 0,
    per_shard: int = 7,
    **options: Any,
) -> Index:
    """Write shards with these arrays, or bytes in their place, and their index; return it loaded from its file."""
    for start in range(0, len(arrays), per_shard):
        members: dict[str, bytes] = {}
        for number, values in enumerate(arrays[start : start + per_shard], start):
            content = values if isinstance(values, bytes) else npy_file.to_bytes(values)
            members[f"{number:04d}.{extension}"] = content
            if classes:
                members[f"{number:04d}.cls"] = str(number % classes).encode()
        write_tar(folder / f"{start:04d}.tar", members)
    save_index(index_shards(str(folder), **options).index, folder)
    return load_index(str(folder))


class LinearAutoencoder(nn.Module):
    """A fixed orthogonal map of blocks of 2x2 pixels to four channels, whose inverse decodes without loss.

    The moments of a block x are A x + b and the logarithm of `deviation` squared. `slow` is seconds per batch.
    """

    def __init__(self, deviation: float = 0.5, slow: float = 0.0, seed: int = 3) -> None:
        super().__init__()
        matrix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()).Q.float()
        self.register_buffer("matrix", matrix)
        self.deviation, self.slow = deviation, slow

    def encode(self, images: Tensor) -> Tensor:
        time.sleep(self.slow)
        blocks = F.pixel_unshuffle(images, 2)
        means = torch.einsum("ij,njhw->nihw", self.get_buffer("matrix"), blocks) + 2.0
        return torch.cat([means, torch.full_like(means, 2 * math.log(self.deviation))], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(torch.einsum("ji,njhw->nihw", self.get_buffer("matrix"), latents - 2.0), 2)


class PlainAutoencoder(LinearAutoencoder):
    """The same without variances."""

    moments = False

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images)[:, :4]


class Pooled(nn.Module):
    """A detector without weights: the means of quarters of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float(), images.shape[-1] // 2).flatten(1)
