"""Decoded samples between processes: loaders decode straight into memory that the trainer has mapped too.

Sending each batch as shared memory of its own would cost its page faults anew every time, which at 512 pixels take
longer than decoding. Here a ring of slots is mapped once; only the slot's number travels.
"""

from __future__ import annotations

import math
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SampleBuffers:
    """`slots` arrays of one type and shape; may be passed to processes when they are started, and only then."""

    def __init__(self, context: ForkServerContext, slots: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.slots, self._dtype, self._shape = slots, dtype, shape
        self._memory: Any = context.RawArray("B", slots * math.prod(shape) * dtype.itemsize)

    def __getitem__(self, slot: int) -> NDArray[Any]:
        count = math.prod(self._shape)
        start = slot * count * self._dtype.itemsize
        return np.frombuffer(self._memory, self._dtype, count, start).reshape(self._shape)
