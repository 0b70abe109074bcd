"""Predict the time of a training step on many GPUs with a latency-bandwidth model of the collectives.

A message of n bytes takes `latency + n / bandwidth` over a link (Hockney 1994). A sum over W ranks takes, as a ring,
2 (W - 1) messages of n / W bytes one after another; as a tree, twice ceil(log2 W) messages in a pipeline, hence
2 n / bandwidth (Thakur et al. 2005, section 4.5). Between nodes of g ranks it is done by shares: scattered within the
nodes, summed between them, and gathered within them.

The model ignores stragglers, other jobs on the network, and kernel launch times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BACKWARD = 2 / 3
"""Share of an update's computation that its backward pass is: twice the forward pass."""


@dataclass(frozen=True)
class Link:
    """Between two GPUs of a node, or between two nodes."""

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
    """True if all-reduces may use trees, as in NCCL; gloo uses rings."""


@dataclass(frozen=True)
class Update:
    """One player's, on one rank."""

    seconds: float
    """Of computation, forward and backward, without any communication."""
    gradient_bytes: float
    buckets: int
    """Pieces that the gradients are summed in, equally large, as the backward pass completes them; 0: they are not."""
    statistics: int
    """Sums of batch statistics, which are waited for; half of them are in the backward pass."""
    statistics_bytes: float
    """Of one of them."""


def ring_seconds(size: float, ranks: int, link: Link) -> float:
    """Of a sum of so many bytes over ranks in a ring."""
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def tree_seconds(size: float, ranks: int, link: Link) -> float:
    """The same over a tree."""
    return 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * size / link.bandwidth if ranks > 1 else 0.0


def sum_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Of a sum of so many bytes over ranks that fill one node after another, each part in the faster way."""

    def fastest(among: int, link: Link) -> float:
        ring = ring_seconds(size, among, link)
        return min(ring, tree_seconds(size, among, link)) if cluster.trees else ring

    within = min(ranks, cluster.per_node)
    return fastest(within, cluster.inside) + fastest(math.ceil(ranks / within), cluster.between)


def update_seconds(update: Update, ranks: int, cluster: Cluster) -> float:
    """Of one update. Sums are made one at a time, in the order in which the backward pass asks for them."""
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
    """When in the backward pass, as a share of it, a sum is asked for, and whether it is waited for."""
    ready = [((number + 1) / buckets, False) for number in range(buckets)]
    needed = [((number + 0.5) / statistics, True) for number in range(statistics)]
    yield from sorted(ready + needed)


def step_seconds(updates: Sequence[Update], ranks: int, cluster: Cluster) -> float:
    """Of a step of these updates, one after another."""
    return sum(update_seconds(update, ranks, cluster) for update in updates)


def efficiency(updates: Sequence[Update], ranks: int, cluster: Cluster) -> float:
    """Share of a step that is computation: how much of so many GPUs' work is had, at an unchanged batch of each."""
    return sum(update.seconds for update in updates) / step_seconds(updates, ranks, cluster)
