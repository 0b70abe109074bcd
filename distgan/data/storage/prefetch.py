"""Download remote shards ahead of the stream, and check that the cache can hold the shards that are read at once."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from distgan.config import DataConfig
from distgan.data.index.table import Index, Shard
from distgan.data.storage.locations import is_remote
from distgan.data.storage.shard_cache import ShardCache
from distgan.errors import UserError

_PARALLEL_DOWNLOADS = 4
_TOUCH_SECONDS = 5.0


def processes_on_node() -> int:
    """Return the number of ranks that share this node's cache, from the launcher's LOCAL_WORLD_SIZE."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_capacity(config: DataConfig, index: Index, world_size: int) -> None:
    """Raise UserError if the cache cannot hold the remote shards that one node reads at the same time.

    Permutation needs all shards. Lanes need, per lane that the node reads, the shards that one shuffle block may span
    and the next one; of each source, if there are several.
    """
    if not index.any_remote:
        return
    parts = [index.shards[source.shards.start : source.shards.stop] for source in index.sources] or [index.shards]
    # Of several sources, the nodes' parts of a batch differ by a few samples from step to step, so by another lane.
    spare = 1 + bool(index.sources)
    lanes = min(config.lanes, -(-config.lanes * processes_on_node() // world_size) + spare)
    needed = sum(_bytes_at_once(config, part, lanes) for part in parts)
    if needed > config.cache_gigabytes * 1e9:
        fix = (
            "or use data.order=lanes"
            if config.order == "permutation"
            else "or lower data.shuffle_block or data.lanes, or make the shards smaller"
        )
        raise UserError(
            f"data.cache_gigabytes={config.cache_gigabytes:g}: the cache is too small: data.order={config.order} needs "
            f"{needed / 1e9:.3g} GB of remote shards per node at once; raise it to {1.05 * needed / 1e9:.3g}, {fix}"
        )


def _bytes_at_once(config: DataConfig, shards: Sequence[Shard], lanes: int) -> int:
    sizes = np.array([shard.size for shard in shards if is_remote(shard.url)], np.int64)
    if config.order == "permutation":
        return int(sizes.sum())
    counts = np.array([shard.count for shard in shards], np.int64)
    at_once = lanes * (-(-config.shuffle_block // int(counts.mean())) + 2)
    return int(np.sort(sizes)[::-1][:at_once].sum())


class Prefetcher:
    """Download the shards of this rank's next positions, in stream order, as far ahead as the cache allows.

    Args:
        chunks: endless iterator of (first position after the chunk, samples of the chunk), in stream order.
        budget: maximum total bytes of the distinct shards between the stream's position and the look-ahead.
    """

    def __init__(
        self, cache: ShardCache, index: Index, chunks: Iterator[tuple[int, NDArray[np.int64]]], budget: int
    ) -> None:
        self._cache, self._index, self._chunks, self._budget = cache, index, chunks, budget
        self._window: deque[tuple[int, list[int]]] = deque()
        self._uses: Counter[int] = Counter()
        self._position, self._closed = 0, False
        self._touched = -_TOUCH_SECONDS
        self._changed = threading.Condition()
        self._upcoming = self._fresh_shards()
        self._turn = threading.Lock()
        for _ in range(_PARALLEL_DOWNLOADS):
            # Daemon threads, so that a download does not delay the end of the process.
            threading.Thread(target=self._run, name="shard-prefetch", daemon=True).start()

    def advance(self, position: int) -> None:
        """Set the stream's current position."""
        with self._changed:
            self._position = position
            if self._window and self._window[0][0] <= position:
                self._changed.notify()

    def close(self) -> None:
        """Start no more downloads."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._turn:
                shard = next(self._upcoming, None)
            if shard is None:
                return
            try:
                os.close(self._cache.open(self._index.shards[shard]))
            except (OSError, UserError):
                continue  # the reader meets the same error and reports it with the sample's name

    def _fresh_shards(self) -> Iterator[int]:
        """Yield remote shards in the order of first use, each when it enters the window; end when closed."""
        while self._wait_for_room():
            end, samples = next(self._chunks)
            used = dict.fromkeys(self._index.shard_of(samples).tolist())
            shards = [shard for shard in used if is_remote(self._index.shards[shard].url)]
            fresh = [shard for shard in shards if not self._uses[shard]]
            with self._changed:
                self._window.append((end, shards))
                self._uses.update(shards)
            yield from fresh

    def _wait_for_room(self) -> bool:
        """Wait until the window may take another chunk; return False once closed."""
        with self._changed:
            while not self._closed:
                while self._window and self._window[0][0] <= self._position:
                    self._uses.subtract(self._window.popleft()[1])
                ahead = [self._index.shards[shard] for shard, count in self._uses.items() if count > 0]
                if time.monotonic() - self._touched > _TOUCH_SECONDS:
                    self._touched = time.monotonic()
                    self._cache.touch(ahead)
                # An epoch covers all shards, so looking further ahead finds none to download.
                within_epoch = not self._window or self._window[-1][0] - self._window[0][0] < len(self._index)
                if within_epoch and (not self._window or sum(shard.size for shard in ahead) < self._budget):
                    return True
                self._changed.wait()
            return False
