"""Shape, dtype and decoder of the samples of each kind, for the reader, the shared buffers and the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distgan.config import DataConfig
from distgan.config.fields import rgb
from distgan.data.index.table import OTHER, Index, kind_of
from distgan.data.kinds import images, latents, points, text
from distgan.errors import UserError

Values = NDArray[Any]


@dataclass(frozen=True)
class SampleFormat:
    """Memory layout of a run's samples, and the function that decodes one."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Shape of one sample: images (resolution, resolution, channels), text (length,), points (dimensions,), moments
    (2 channels, resolution, resolution) or latents (channels, resolution, resolution)."""
    decode_into: Callable[[Values, memoryview, str], None]
    """Decode one sample. Arguments: contiguous output array, member data, extension. Raises UnreadableSampleError."""
    decode_mirrored_into: Callable[[Values, memoryview, str], None] | None = None
    """The same for a mirrored sample; None where its columns are reversed after decoding."""

    @property
    def is_image(self) -> bool:
        """Whether samples are images, channels-last."""
        return self.dtype == np.uint8

    def empty(self, count: int, *, pin_memory: bool = False) -> Tensor:
        """Return an uninitialized tensor for `count` samples, shape (count, *shape). Decode into its `numpy()`."""
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        return torch.empty((count, *self.shape), dtype=dtype, pin_memory=pin_memory)

    def as_values(self, decoded: Tensor) -> Tensor:
        """Return decoded samples in the shape of a batch: images as (n, channels, height, width), channels-last."""
        return decoded.permute(0, 3, 1, 2) if self.is_image else decoded


def sample_format(config: DataConfig, index: Index) -> SampleFormat:
    """Return the format of this run's samples. Raises UserError if the kind of the shards differs from `data.kind`."""
    # Stages may make anything of their members, but characters are numbered by the text of the shards.
    if index.kind != config.kind and (config.stages is None or config.kind == "text"):
        fix = f"set data.kind={index.kind}" if index.kind != kind_of(OTHER) else "set data.stages, which reads them"
        raise UserError(
            f"data.kind={config.kind}: the shards of data.path={config.path} hold {index.kind}; "
            f"{fix}, or set data.path to other shards"
        )
    if config.kind == "images":
        background = rgb(config.background)
        decode = partial(images.decode_into, max_pixels=config.max_pixels, background=background)
        return SampleFormat(np.dtype(np.uint8), (config.resolution, config.resolution, config.channels), decode)
    if config.kind == "text":
        assert index.vocabulary is not None
        encode = text.LineEncoder(index.vocabulary, config.length)
        return SampleFormat(np.dtype(np.uint16), (config.length,), encode)
    if config.kind == "latents":
        return _latent_format(config, index)
    return SampleFormat(np.dtype(np.float32), (config.dimensions,), points.decode_into)


def _latent_format(config: DataConfig, index: Index) -> SampleFormat:
    stored = index.latents
    assert stored is not None
    for name in ("channels", "resolution"):
        if getattr(config, name) != getattr(stored, name):
            raise UserError(
                f"data.{name} = {getattr(config, name)}: the latents of data.path={config.path} have {name} "
                f"{getattr(stored, name)}; set data.{name}={getattr(stored, name)}"
            )
    if config.mirror and not stored.flipped:
        raise UserError(
            "data.mirror = true: the latents of the mirror images are not in the shards, and mirrored latents are not "
            "latents of mirror images; encode them with --flips, or set data.mirror=false"
        )
    shape = stored.kind._replace(flipped=False).shape
    mirrored = latents.DecodeLatent(stored, mirrored=True) if stored.flipped else None
    return SampleFormat(np.dtype(np.float32), shape, latents.DecodeLatent(stored), mirrored)
