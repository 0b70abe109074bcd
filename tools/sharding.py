"""Predict the time of updates under FSDP2, HSDP and ZeRO, with the links and collectives of `tools/scaling.py`.

FSDP2 gathers the weights of a unit, a block or what is around the blocks, before each pass that reaches it, and again
for the backward pass if they were dropped after the forward pass. After the last backward pass of a unit, it
reduce-scatters the gradients. The gather of a unit starts with the computation of the unit before it, and a
reduce-scatter runs beside the computation of the units that follow (Zhao et al. 2023, section 3.3). HSDP does the same
among the ranks of a node, and then all-reduces the gradients of each shard between nodes. ZeRO-1 and ZeRO-2 all-reduce
gradients as DDP does, and gather the new weights after the optimizer's step, when nothing else runs.

The link does one thing at a time, in the order in which collectives start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tools.scaling import Cluster, Link, Update, sum_seconds, update_seconds


@dataclass(frozen=True)
class Network:
    """Weights of a network, as FSDP2 gathers them."""

    around: float
    """Bytes of what is around the blocks. They stay gathered from their first use in an update to its end."""
    blocks: tuple[float, ...] = ()
    """Bytes of each block, in the order of the forward pass. Without blocks, the network is one unit."""

    @property
    def bytes(self) -> float:
        """Bytes of all weights."""
        return self.around + sum(self.blocks)


@dataclass(frozen=True)
class Phase:
    """One pass through a network, forward or backward."""

    network: Network
    seconds: float
    """Computation time."""
    backward: bool = False
    reduces: bool = False
    """True in the last backward pass of the network that is trained: autograd has then summed the gradients of all."""
    from_data: bool = False
    """True if the inputs need no gradient. FSDP2 then keeps the first block until the end of the backward pass."""


@dataclass(frozen=True)
class Segment:
    """Computation of one unit in one phase, with the collectives before and after it."""

    seconds: float
    gathered: float
    """Bytes of the unit's weights, if they are gathered for this segment; else 0."""
    reduced: float
    """Bytes of the unit's gradients, if they are reduced afterward; else 0."""
    exchanged: float
    """Bytes of gradients that HSDP then exchanges between replicas: of the sum over micro-batches, in the last one."""


def segments(
    phases: Sequence[Phase], *, micro_batches: int = 1, reshards: bool = True, gradient_bytes: float = 1.0
) -> list[Segment]:
    """Return the segments of an update, in order.

    Args:
        phases: passes of one micro-batch.
        reshards: drop a block's weights after its forward pass. False keeps all weights until the end of the update, as
            second derivatives need it.
        gradient_bytes: bytes of gradients per byte of weights: 1, or 0.5 if they are reduced in bfloat16.
    """
    made, kept = list[Segment](), set[tuple[int, int]]()
    resharded = {id(phase.network) for phase in phases if phase.backward and reshards}
    for left in reversed(range(micro_batches)):
        for phase in phases:
            network = phase.network
            units = [*enumerate((network.around, *network.blocks))]
            for number, size in reversed(units) if phase.backward else units:
                key = id(network), number
                # Gradients of a network without blocks are summed over micro-batches before they are reduced.
                reduced = size * gradient_bytes if phase.reduces and (network.blocks or not left) else 0.0
                exchanged = 0.0 if left and gradient_bytes == 1.0 else reduced  # bfloat16: in each micro-batch
                gathered = 0.0 if key in kept else size
                made.append(Segment(phase.seconds * size / network.bytes, gathered, reduced, exchanged))
                first = phase.backward and phase.from_data and number == 1
                if number == 0 or first or not reshards:
                    kept.add(key)
        kept = {key for key in kept if key[0] not in resharded}
    return made


def half_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Return the time of an all-gather or reduce-scatter of `size` bytes: half of an all-reduce in a ring.

    Over several nodes it is hierarchical, as `sum_seconds` is.
    """

    def ring(among: int, link: Link) -> float:
        return (among - 1) * (link.latency + size / among / link.bandwidth)

    within = min(ranks, cluster.per_node)
    return ring(within, cluster.inside) + ring(math.ceil(ranks / within), cluster.between)


def sharded_seconds(
    made: Iterable[Segment], ranks: int, cluster: Cluster, *, replicas: int = 1, overlaps: bool = True
) -> float:
    """Return the time of an update.

    Args:
        replicas: number of groups of ranks that have all weights each. 1 for FSDP; the number of nodes for HSDP.
        overlaps: collectives run beside the computation, as with NCCL. gloo blocks the thread that computes.
    """
    shards = ranks // replicas
    nodes = Cluster(1, cluster.between, cluster.between, cluster.trees)

    def gather(size: float) -> float:
        return half_seconds(size, shards, cluster) if size and shards > 1 else 0.0

    def reduce(one: Segment) -> float:
        return gather(one.reduced) + (sum_seconds(one.exchanged, replicas, nodes) if one.exchanged else 0.0)

    return _overlapped(made, gather, reduce) if overlaps else _in_turn(made, gather, reduce)


def _in_turn(made: Iterable[Segment], gather: Callable[[float], float], reduce: Callable[[Segment], float]) -> float:
    return sum(gather(one.gathered) + one.seconds + reduce(one) for one in made)


def _overlapped(made: Iterable[Segment], gather: Callable[[float], float], reduce: Callable[[Segment], float]) -> float:
    started, now, free, waiting = 0.0, 0.0, 0.0, 0.0
    for one in made:
        ready = now
        if one.gathered:
            ready = free = max(free, started) + gather(one.gathered)
        if waiting:  # gradients of the segment before, which ended at `now`
            free = max(free, now) + waiting
        started = max(now, ready)
        now, waiting = started + one.seconds, reduce(one)
    return max(now, max(free, now) + waiting)


def zero_seconds(update: Update, weight_bytes: float, ranks: int, cluster: Cluster) -> float:
    """Return the time of an update under ZeRO-1 or ZeRO-2 of a network with so many bytes of weights."""
    return update_seconds(update, ranks, cluster) + half_seconds(weight_bytes, ranks, cluster)
