"""Copy of tensors in host memory in the layout of a safetensors file, ready to be written to disk.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian length of the header, a JSON
header {name: {dtype, shape, data_offsets}} padded with spaces, and the tensors' bytes without gaps. Unlike
`safetensors.torch.save`, writing from the snapshot needs no second copy in memory.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distgan.distributed.parts import Stored

Tensors = Mapping[str, Tensor]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names that safetensors files give to torch's types."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 8 << 20
_ALIGNMENT = 8

Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Name, type and shape of each tensor of a file, in the order of its bytes."""


def ordered(tensors: Mapping[str, Tensor | Stored]) -> Layout:
    """Return the layout of a file with these tensors. Its order keeps every tensor aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    return tuple((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names)


def header(layout: Layout) -> bytes:
    """Return the bytes of a safetensors file before those of its tensors."""
    entries = {
        name: {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": span}
        for (name, dtype, shape), span in zip(layout, itertools.pairwise(_offsets(layout)), strict=True)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


class Snapshot:
    """Host memory for one set of tensors, reused for the next set of the same layout.

    Copies from CUDA to pinned memory are asynchronous; `chunks` waits for them.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._pinned = False
        self._views: list[Tensor] = []
        self._data = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def copy(self, tensors: Tensors) -> None:
        """Copy the tensors. Later in-place changes to them do not affect the copy.

        Args:
            tensors: any shapes and strides, on CPU or one CUDA device, of the dtypes safetensors and torch share.
        """
        layout = ordered(tensors)
        cuda = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if layout != self._layout or (cuda is not None and not self._pinned):
            self._allocate(layout, pinned=cuda is not None)
        for (name, _, _), view in zip(layout, self._views, strict=True):
            tensor = tensors[name].detach()
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                # Not `copy_`: it splits the work among torch's threads, which synchronize at every tensor. On busy
                # cores that costs ten times what it saves.
                np.copyto(_bytes(view), _bytes(tensor))
            else:
                view.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.current_stream(cuda).record_event() if cuda is not None else None

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Wait for the copies, then yield the content of the file in chunks."""
        if self._copied is not None:
            self._copied.synchronize()
        assert self._layout is not None, "nothing was copied yet"
        yield header(self._layout)
        content = memoryview(self._data.numpy())  # type: ignore[arg-type]
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK]

    def _allocate(self, layout: Layout, *, pinned: bool) -> None:
        # Free the old memory first, because both may not fit.
        self._layout, self._views, self._data = None, [], torch.empty(0, dtype=torch.uint8)
        offsets = _offsets(layout)
        self._data = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=pinned)
        for (_, dtype, shape), (start, end) in zip(layout, itertools.pairwise(offsets), strict=True):
            self._views.append(self._data[start:end].view(dtype).view(shape))
        self._layout, self._pinned = layout, pinned


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    return tensor.view(-1).view(torch.uint8).numpy()


def _offsets(layout: Layout) -> list[int]:
    sizes = (dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in layout)
    return [0, *itertools.accumulate(sizes)]
