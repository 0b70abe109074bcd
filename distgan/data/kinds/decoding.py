"""What a sample of each kind is once it is decoded: the reader, the shared buffers and the stream ask here."""

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
from distgan.data.index.table import Index
from distgan.data.kinds import images, points, text
from distgan.errors import UserError

Values = NDArray[Any]


@dataclass(frozen=True)
class SampleFormat:
    """How samples of a run lie in memory, and how a member of a shard becomes one."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Of one sample: images (resolution, resolution, channels), text (length,), points (dimensions,)."""
    decode_into: Callable[[Values, memoryview, str], None]
    """Of one sample: where it goes, contiguous; the member's data and extension. Raises UnreadableSampleError."""

    def empty(self, count: int, *, pin_memory: bool = False) -> Tensor:
        """Room for so many samples, shape (count, *shape); its `numpy()` is what is decoded into."""
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        return torch.empty((count, *self.shape), dtype=dtype, pin_memory=pin_memory)

    def as_values(self, decoded: Tensor) -> Tensor:
        """Decoded samples as batches hold them: the channels of images come first, but in memory they stay last."""
        return decoded.permute(0, 3, 1, 2) if decoded.dim() == 4 else decoded


def sample_format(config: DataConfig, index: Index) -> SampleFormat:
    """What this run's samples are. Raises UserError when the shards hold samples of another kind than `data.kind`."""
    if index.kind != config.kind:
        raise UserError(
            f"data.kind = {config.kind}, but the shards of data.path = {config.path} hold {index.kind}; "
            f"set data.kind={index.kind}, or name other shards"
        )
    if config.kind == "images":
        background = rgb(config.background)
        decode = partial(images.decode_into, max_pixels=config.max_pixels, background=background)
        return SampleFormat(np.dtype(np.uint8), (config.resolution, config.resolution, config.channels), decode)
    if config.kind == "text":
        assert index.vocabulary is not None
        encode = text.LineEncoder(index.vocabulary, config.length)
        return SampleFormat(np.dtype(np.uint16), (config.length,), encode)
    return SampleFormat(np.dtype(np.float32), (config.dimensions,), points.decode_into)
