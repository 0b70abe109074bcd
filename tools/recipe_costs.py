"""Weights and computation of a recipe's updates, from its networks on the meta device: without data or a GPU.

Assumptions: the computation of a pass is divided among the blocks of a network in proportion to their bytes of weights.
A term of `objective.terms` looks at a layer, and costs nothing.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distgan.config import Config
from distgan.config.objective import ZeroCenteredPenaltyConfig
from distgan.distributed.blocks import declared_blocks
from distgan.networks.moving import moving_buffers
from distgan.networks.shape import sample_shape
from tools.scaling import Cluster, Update, update_seconds
from tools.sharding import Network, Phase, Segment, segments, sharded_seconds, zero_seconds

BUCKET, FIRST_BUCKET = 25 << 20, 1 << 20
"""Bytes of DDP's gradient buckets."""
EXACT = 3
"""Forward passes that an exact penalty adds to the backward pass: an update with R1 takes twice as long as without."""


@dataclass(frozen=True)
class Costs:
    """A network's weights, and the computation of its forward pass."""

    network: Network
    flops: float
    """Floating-point operations per sample."""
    moves: bool = False
    """True if passes change buffers, as spectral norm does."""


def costs(config: Config, classes: int) -> dict[str, Costs]:
    """Return the costs of the generator and the discriminator of a recipe.

    Args:
        classes: number of classes in the data, if the recipe is conditional.
    """
    channels = config.data.channels if config.data.kind == "latents" else 0
    shape = sample_shape(config.data, num_classes=classes, shift=(0.0,) * channels, scale=(1.0,) * channels)
    with torch.device("meta"):
        generator = config.generator.build(shape, config.generator.latent_size)
        discriminator = config.discriminator.build(shape)
        labels = torch.zeros(1, dtype=torch.int64) if shape.num_classes else None
        # In training mode, a generator of several levels makes all of them, as its discriminator takes them.
        with torch.no_grad():
            flops, samples = _flops(generator, torch.zeros(1, config.generator.latent_size), labels)
            judged, _ = _flops(discriminator, samples, labels)
    return {
        "generator": Costs(weights(generator), flops),
        "discriminator": Costs(weights(discriminator), judged, bool(moving_buffers(discriminator))),
    }


def _flops(network: nn.Module, *arguments: object) -> tuple[float, torch.Tensor]:
    with FlopCounterMode(display=False) as counter:
        made = network(*arguments)
    return float(counter.get_total_flops()), made


def weights(network: nn.Module) -> Network:
    """Return the bytes of a network's weights by block."""
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in declared_blocks(network)]
    return Network(sum(weight.nbytes for weight in network.parameters()) - sum(sizes), tuple(sizes))


def phases(
    config: Config, by_role: dict[str, Costs], role: str, due: frozenset[str], images: int, flops: float
) -> list[Phase]:
    """Return the passes of an update of a player, in order.

    Args:
        due: gradient penalties of an update of the discriminator.
        images: batch size per GPU.
        flops: floating-point operations per second that a GPU achieves.
    """
    generator, discriminator = by_role["generator"], by_role["discriminator"]

    def phase(of: Costs, forwards: float, **backward: bool) -> Phase:
        return Phase(of.network, forwards * of.flops * images / flops, **backward)

    again = 1 if config.training.activation_checkpointing else 0  # a forward pass inside of the backward pass
    if role == "generator":
        judged = [1.0, 1.0] if config.objective.generator_needs_reals else [1.0]
        return [
            phase(generator, 1),
            *(phase(discriminator, forwards) for forwards in judged),
            phase(discriminator, 1 + again, backward=True),  # for its inputs alone, because its weights are frozen
            phase(generator, 2 + again, backward=True, reduces=True, from_data=True),
        ]
    passes = discriminator_passes(config, due, moves=discriminator.moves)
    return [
        phase(generator, 1),
        *(phase(discriminator, forwards) for forwards, _ in passes),
        *(
            phase(discriminator, backward + again * forwards, backward=True, reduces=number == 0, from_data=True)
            for number, (forwards, backward) in reversed([*enumerate(passes)])
        ),
    ]


def updates(config: Config) -> list[tuple[str, float, frozenset[str]]]:
    """Return the kinds of updates: the player, their number in a step, and the gradient penalties that are due.

    Lazy penalties are due in some updates of the discriminator only, so its numbers are means over steps.
    """
    found = ((name, getattr(config.objective, name)) for name in ("r1", "r2", "gradient_penalty"))
    every = {name: penalty.every for name, penalty in found if penalty is not None}
    period = math.lcm(*every.values())
    due = Counter(frozenset(name for name in every if not number % every[name]) for number in range(period))
    critic = config.training.critic_steps
    return [("discriminator", critic * count / period, kind) for kind, count in due.items()] + [
        ("generator", 1.0, frozenset())
    ]


def discriminator_passes(config: Config, due: frozenset[str], *, moves: bool = False) -> list[tuple[float, float]]:
    """Return the passes of the discriminator in its update: cost of forward and backward, in passes of one batch.

    Args:
        due: gradient penalties of this update: `r1`, `r2`, `gradient_penalty`.
        moves: its passes change buffers, as spectral norm does.
    """
    objective = config.objective
    penalties = [penalty if name in due else None for name, penalty in (("r1", objective.r1), ("r2", objective.r2))]
    exact = [EXACT if penalty is not None and penalty.method == "exact" else 0.0 for penalty in penalties]
    ends = [end for penalty in penalties for end in _ends(penalty)]
    apart = moves or any(exact) or bool(objective.terms) or objective.alignment is not None
    if not config.discriminator.facts.batch_statistics and (ends or not apart):
        # Reals, fakes and the ends of differences go through it together.
        together = 2.0 + sum(ends)
        made = [(together, together * (2 + max(exact)))]
    else:
        made = [(1.0, 2 + more) for more in exact] + [(end, 2 * end) for end in ends]
    return made + ([(1.0, 2.0 + EXACT)] if "gradient_penalty" in due else [])


def _ends(penalty: ZeroCenteredPenaltyConfig | None) -> list[float]:
    """Return the size of each end of the differences that are due, in batches."""
    if penalty is None or penalty.method != "finite_difference":
        return []
    return [1 / penalty.stride] * penalty.draws * (2 if penalty.antithetic else 1)


def keeps_weights(config: Config, due: frozenset[str]) -> bool:
    """Return True if an update of the discriminator takes second derivatives, for which weights stay gathered."""
    zero_centered = {"r1": config.objective.r1, "r2": config.objective.r2}
    exact = any(
        penalty is not None and penalty.method == "exact" for name, penalty in zero_centered.items() if name in due
    )
    return exact or "gradient_penalty" in due


def replicated(seconds: float, weight_bytes: float, gradient_bytes: float) -> Update:
    """Return an update under DDP.

    Args:
        gradient_bytes: bytes of gradients per byte of weights.
    """
    buckets = 1 + math.ceil(max(0.0, weight_bytes - FIRST_BUCKET) / BUCKET)
    return Update(seconds, weight_bytes * gradient_bytes, buckets, 0, 0.0)


def gradient_ratio(config: Config) -> float:
    """Return the bytes of gradients per byte of weights."""
    return 0.5 if config.training.gradient_precision == "bf16" else 1.0


def sharded(config: Config, passes: list[Phase], due: frozenset[str]) -> list[Segment]:
    """Return the segments under FSDP2 of an update with these passes, which its micro-batches divide."""
    micro_batches = config.training.accumulation
    parts = [replace(phase, seconds=phase.seconds / micro_batches) for phase in passes]
    reshards = not keeps_weights(config, due)
    return segments(parts, micro_batches=micro_batches, reshards=reshards, gradient_bytes=gradient_ratio(config))


def engine_step(
    config: Config,
    by_role: dict[str, Costs],
    engine: str,
    ranks: int,
    cluster: Cluster,
    images: int,
    flops: float,
    *,
    overlaps: bool = True,
) -> float:
    """Return the seconds of a step under an engine: `ddp`, `zero1`, `zero2`, `fsdp` or `hsdp`.

    Args:
        images, flops: see `phases`.
        overlaps: see `sharded_seconds`.
    """
    total = 0.0
    for role, count, due in updates(config):
        passes = phases(config, by_role, role, due, images, flops)
        if engine in ("fsdp", "hsdp"):
            made = sharded(config, passes, due)
            replicas = max(1, ranks // cluster.per_node) if engine == "hsdp" else 1
            total += count * sharded_seconds(made, ranks, cluster, replicas=replicas, overlaps=overlaps)
            continue
        size = by_role[role].network.bytes
        update = replicated(sum(phase.seconds for phase in passes), size, gradient_ratio(config))
        total += count * (
            update_seconds(update, ranks, cluster) if engine == "ddp" else zero_seconds(update, size, ranks, cluster)
        )
    return total


def step_flops(config: Config, by_role: dict[str, Costs]) -> float:
    """Return the floating-point operations of a step per image of the batch."""
    return sum(
        count * phase.seconds
        for role, count, due in updates(config)
        for phase in phases(config, by_role, role, due, 1, 1.0)
    )


def sent_bytes(config: Config, by_role: dict[str, Costs]) -> dict[str, dict[str, float]]:
    """Return the bytes of a step under FSDP2 by player and purpose: of the full tensors, as they are counted."""
    found = {role: {"weights": 0.0, "gradients": 0.0} for role in ("discriminator", "generator")}
    for role, count, due in updates(config):
        passes = phases(config, by_role, role, due, 1, 1.0)
        for one in sharded(config, passes, due):
            found[role]["weights"] += count * one.gathered
            found[role]["gradients"] += count * one.reduced
    return found
