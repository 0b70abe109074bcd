"""Share decoded samples between processes: data loader workers decode into memory that the trainer also maps.

A new shared memory block per batch would cost page faults per batch, which take longer than decoding at 512 pixels.
Here a ring of slots is mapped once, and workers send only the slot number.
"""

from __future__ import annotations

import math
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SampleBuffers:
    """`slots` arrays of one dtype and shape. Pass them to a process only when you start it."""

    def __init__(self, context: ForkServerContext, slots: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.slots, self._dtype, self._shape = slots, dtype, shape
        self._memory: Any = context.RawArray("B", slots * math.prod(shape) * dtype.itemsize)

    def __getitem__(self, slot: int) -> NDArray[Any]:
        count = math.prod(self._shape)
        start = slot * count * self._dtype.itemsize
        return np.frombuffer(self._memory, self._dtype, count, start).reshape(self._shape)
