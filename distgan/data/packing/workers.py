"""Read and convert samples on all cores, with results in order and bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distgan.data.loader_processes import exit_with_parent
from distgan.data.packing.sources.source import Encoded, InvalidSampleError, Source
from distgan.errors import UserError

_CHUNK_BYTES = 1 << 22
_CHUNK_SAMPLES = 256
_CHUNKS_IN_FLIGHT = 3

Converted = Encoded | InvalidSampleError
Conversion = Callable[[Any], Encoded]
"""Convert what a source reads to a file in a shard. Raises InvalidSampleError. Pickled to worker processes."""


@dataclass(frozen=True)
class _Job:
    """Settings that a worker process receives once."""

    read: Callable[[Any], Any]
    conversion: Conversion

    def __call__(self, slots: list[Any]) -> list[Converted]:
        return [self._convert(slot) for slot in slots]

    def _convert(self, slot: Any) -> Converted:
        try:
            return self.conversion(self.read(slot))
        except InvalidSampleError as error:
            return error


def convert_all(
    source: Source[Any], order: NDArray[np.int64], conversion: Conversion, workers: int
) -> Generator[list[Converted], None, None]:
    """Yield the source's converted samples in the given order, in lists of varying length (a few MB each).

    Args:
        order: sample indices of the source, int64.
        conversion: converts each sample.
        workers: number of worker processes; 1 converts in this process. The results do not depend on it.

    Raises:
        UserError: a worker process was killed.
    """
    job = _Job(source.read, conversion)
    if workers == 1:
        for number in order.tolist():
            yield job([source.slots[number]])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
    try:
        yield from _in_order(pool, source, order, workers * _CHUNKS_IN_FLIGHT)
    except BrokenProcessPool:
        raise UserError(
            f"workers {workers}: a worker process was killed, most likely because memory ran out; use fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Return the number of cores that this process may use, which a batch system may limit."""
    return len(os.sched_getaffinity(0))


def _in_order(
    pool: ProcessPoolExecutor, source: Source[Any], order: NDArray[np.int64], in_flight: int
) -> Iterator[list[Converted]]:
    pending: deque[Future[list[Converted]]] = deque()
    submitted, samples, size = 0, 0, 0
    while submitted < len(order) or pending:
        while submitted < len(order) and len(pending) < in_flight:
            # Lists of similar bytes: thumbnails then share messages, and large scans do not fill memory.
            length = max(1, min(_CHUNK_SAMPLES, _CHUNK_BYTES * samples // size)) if size else 1
            numbers = order[submitted : submitted + length].tolist()
            pending.append(pool.submit(_work, [source.slots[number] for number in numbers]))
            submitted += len(numbers)
        converted = pending.popleft().result()
        samples += len(converted)
        size += sum(len(sample.data) for sample in converted if isinstance(sample, Encoded))
        yield converted


_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers; they need not report it
    # A worker would otherwise outlive a killed parent: it holds both ends of its queue and waits forever.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(slots: list[Any]) -> list[Converted]:
    assert _job is not None
    return _job(slots)
