"""Labeled shards of small pictures, for tests that evaluate."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distgan.config import Config, parse_config


def pictures(count: int, *, channels: int = 1, size: int = 16) -> Tensor:
    """uint8 (count, channels, size, size): bars whose direction is the class, i mod 3, on noise."""
    noise = torch.randint(0, 90, (count, channels, size, size), generator=torch.Generator().manual_seed(4))
    for i, picture in enumerate(noise):
        place = 2 + (i * 7) % (size - 5)
        if i % 3 == 0:
            picture[:, place : place + 3] += 160
        elif i % 3 == 1:
            picture[:, :, place : place + 3] += 160
        else:
            picture += 80
    return noise.to(torch.uint8)


def write_shards(folder: Path, images: Tensor, *, labels: bool = True, broken: frozenset[int] = frozenset()) -> str:
    """Two tars of PNGs with the labels i mod 3; those in `broken` are not PNGs inside. Returns the folder."""
    folder.mkdir()
    half = -(-len(images) // 2)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard * half, min(len(images), (shard + 1) * half)):
                file = io.BytesIO()
                Image.fromarray(np.squeeze(images[i].permute(1, 2, 0).numpy())).save(file, "png")
                _add(tar, f"{i:04d}.png", b"no picture" if i in broken else file.getvalue())
                if labels:
                    _add(tar, f"{i:04d}.cls", str(i % 3).encode())
    return str(folder)


def evaluation_config(
    shards: str, cache: Path, *, channels: int = 1, resolution: int = 16, **evaluation: Any
) -> Config:
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"path": shards, "resolution": resolution, "channels": channels, "num_workers": 0},
            "training": {"steps": 1, "batch_size": 8},
            "evaluation": {"cache_dir": str(cache), "num_samples": 70, "batch_size": 16, **evaluation},
        }
    )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
