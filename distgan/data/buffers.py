"""Pixels between processes: loaders decode straight into memory that the trainer has mapped too.

Sending each batch as shared memory of its own would cost its page faults anew every time, which at 512 pixels take
longer than decoding. Here a ring of slots is mapped once; only the slot's number travels.
"""

from __future__ import annotations

import math
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PixelBuffers:
    """`slots` uint8 arrays of one shape; may be passed to processes when they are started, and only then."""

    def __init__(self, context: ForkServerContext, slots: int, shape: tuple[int, ...]) -> None:
        self.slots, self._shape = slots, shape
        self._memory: Any = context.RawArray("B", slots * math.prod(shape))

    def __getitem__(self, slot: int) -> NDArray[np.uint8]:
        size = math.prod(self._shape)
        return np.frombuffer(self._memory, np.uint8, size, slot * size).reshape(self._shape)
