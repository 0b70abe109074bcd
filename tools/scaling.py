"""Predict the time of a training step on many GPUs with a latency-bandwidth model of the collectives.

A message of n bytes takes `latency + n / bandwidth` over a link (Hockney 1994). An all-reduce over W ranks takes
2 (W - 1) successive messages of n / W bytes in a ring. A pipelined tree takes 2 ceil(log2 W) latencies, and 2 n bytes
at full bandwidth (Thakur et al. 2005, section 4.5). An all-reduce over several nodes is hierarchical: reduce-scatter in
each node, all-reduce between nodes, and all-gather in each node.

The model ignores stragglers, other jobs on the network, and kernel launch times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BACKWARD = 2 / 3
"""Fraction of an update's computation in the backward pass, which takes twice as long as the forward pass."""


@dataclass(frozen=True)
class Link:
    """Link between two GPUs of a node, or between two nodes."""

    latency: float
    """Seconds per message."""
    bandwidth: float
    """Bytes/s in each direction: per GPU inside a node, per node between nodes."""


@dataclass(frozen=True)
class Cluster:
    """Cluster of nodes with equally many ranks."""

    per_node: int
    inside: Link
    between: Link
    trees: bool = True
    """True if all-reduces may use trees, as in NCCL. gloo uses only rings."""


@dataclass(frozen=True)
class Update:
    """Update of one player on one rank."""

    seconds: float
    """Computation time of the forward and backward pass, without communication."""
    gradient_bytes: float
    buckets: int
    """Number of equal gradient buckets. Each is all-reduced once the backward pass has filled it. 0: no all-reduce."""
    statistics: int
    """Number of blocking all-reduces of batch statistics. Half of them happen in the backward pass."""
    statistics_bytes: float
    """Bytes of one all-reduce of batch statistics."""


def ring_seconds(size: float, ranks: int, link: Link) -> float:
    """Return the time of an all-reduce of `size` bytes over a ring of ranks."""
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def tree_seconds(size: float, ranks: int, link: Link) -> float:
    """Return the time of an all-reduce of `size` bytes over a tree of ranks."""
    return 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * size / link.bandwidth if ranks > 1 else 0.0


def sum_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Return the time of an all-reduce of `size` bytes. Ranks fill one node after another.

    Within and between nodes, it uses the faster of ring and tree.
    """

    def fastest(among: int, link: Link) -> float:
        ring = ring_seconds(size, among, link)
        return min(ring, tree_seconds(size, among, link)) if cluster.trees else ring

    within = min(ranks, cluster.per_node)
    return fastest(within, cluster.inside) + fastest(math.ceil(ranks / within), cluster.between)


def update_seconds(update: Update, ranks: int, cluster: Cluster) -> float:
    """Return the time of one update. All-reduces run one at a time, in the order in which they start."""
    bucket = sum_seconds(update.gradient_bytes / max(1, update.buckets), ranks, cluster)
    statistic = sum_seconds(update.statistics_bytes, ranks, cluster)
    in_backward = update.statistics // 2
    forward, backward = (1 - BACKWARD) * update.seconds, BACKWARD * update.seconds
    now = forward + (update.statistics - in_backward) * statistic
    free, done = 0.0, 0.0
    for share, waited_for in _asked(update.buckets, in_backward):
        now += (share - done) * backward
        done = share
        free = max(now, free) + (statistic if waited_for else bucket)
        if waited_for:
            now = free
    return max(now + (1.0 - done) * backward, free)


def _asked(buckets: int, statistics: int) -> Iterator[tuple[float, bool]]:
    """Yield the start of each all-reduce, as a fraction of the backward pass, and True if it blocks."""
    ready = [((number + 1) / buckets, False) for number in range(buckets)]
    needed = [((number + 0.5) / statistics, True) for number in range(statistics)]
    yield from sorted(ready + needed)


def step_seconds(updates: Sequence[Update], ranks: int, cluster: Cluster) -> float:
    """Return the time of a step with these updates, one after another."""
    return sum(update_seconds(update, ranks, cluster) for update in updates)


def efficiency(updates: Sequence[Update], ranks: int, cluster: Cluster) -> float:
    """Return the fraction of a step's time that is computation: the weak-scaling efficiency."""
    return sum(update.seconds for update in updates) / step_seconds(updates, ranks, cluster)
