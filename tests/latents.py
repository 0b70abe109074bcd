"""Small shards of latents whose statistics are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
