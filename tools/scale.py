"""Predict the seconds per step and the efficiency of a recipe on up to 1,024 GPUs.

The tool counts the communication of a step on two real processes. It measures the computation of a step on this machine
at two batch sizes, unless `--compute` gives it. The model of `tools/scaling.py` predicts the rest.

With `--engines`, it compares DDP, ZeRO, FSDP2 by block and HSDP instead. Weights, passes and computation then come from
the recipe's networks and objective (`tools/recipe_costs.py`), without data, processes or a GPU. `--tflops` is what a
GPU achieves in them.

Assumptions: the batch per GPU is the same for any number of GPUs. Updates of both players take equally long. Traffic
that grows with the global batch, such as minibatch statistics, is counted at the recipe's batch size. With `--engines`,
a pass computes in each block in proportion to the bytes of its weights.

    python tools/scale.py configs/digits-dcgan.yaml
    python tools/scale.py configs/cifar10-sngan.yaml --compute 16:0.09 64:0.21 --ethernet 50:1.1
    python tools/scale.py configs/digits-dcgan.yaml generator.width=64 --check 50 200    # as root: simulates two hosts
    python tools/scale.py configs/imagenet256-gat-xl2.yaml --engines ddp zero2 fsdp hsdp --classes 1000 --images 8
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distgan.config import Config, load_config
from tools import communication, recipe_costs, speed
from tools.communication import Kind, Traffic
from tools.scaling import Cluster, Link, Update, efficiency, step_seconds

GPUS = [1 << power for power in range(11)]
LINKS = {"inside": "3:350", "infiniband": "8:340", "ethernet": "30:11"}
"""Default links as `MICROSECONDS:GIGABYTES`: latency per message of a small all-reduce, and achievable GB/s.

The hardware is an H100's NVLink (450 GB/s each way), eight NDR adapters per node (400 GB/s together), and 100 Gbit/s
Ethernet per node with TCP.
"""
EFFICIENT = 0.9


def updates(traffic: dict[Kind, Traffic], critic_steps: int, seconds: float) -> list[Update]:
    """Return the updates of a step, in order.

    Args:
        traffic: traffic of one step.
        critic_steps: discriminator updates per step.
        seconds: computation time of the step.
    """
    made = []
    for player, count in (("discriminator", critic_steps), ("generator", 1)):
        nothing = Traffic(0, 0)
        gradients = traffic.get(Kind(player, "gradients", "allreduce"), nothing)
        sums = traffic.get(Kind(player, "batch statistics", "allreduce"), nothing)
        made += [
            Update(
                seconds / (critic_steps + 1), gradients.bytes / count, round(gradients.number / count),
                round(sums.number / count), sums.bytes / max(1, sums.number),
            )
        ] * count  # fmt: skip
    return made


def accumulated(whole: Sequence[Update], micro_batches: int) -> list[Update]:
    """Split each update into `micro_batches` updates of full size, of which only the last one sends gradients."""
    return [
        replace(update, gradient_bytes=0.0, buckets=0) if number < micro_batches - 1 else update
        for update in whole
        for number in range(micro_batches)
    ]


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit a straight line to (images, seconds) by least squares. Return the seconds per step and per image."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def generator_batch(config: Config, images: int) -> list[str]:
    """Return the overrides that keep the ratio of both players' batches at a batch size of `images`."""
    training = config.training
    if training.generator_batch_size is None:
        return []
    scaled = max(1, round(images * training.generator_batch_size / training.batch_size))
    return [f"training.generator_batch_size={scaled}"]


def predict(options: argparse.Namespace, traffic: dict[Kind, Traffic], config: Config) -> None:
    """Print one table per type of network between nodes."""

    def measured(images: int) -> float:
        return speed.alone(options.recipe, [*options.settings, *generator_batch(config, images)], images)

    points = options.compute or [(images, measured(images)) for images in (8, 32)]
    fixed, each = line(points)
    print(
        f"Computation per step: {fixed * 1e3:.3g} ms plus {each * 1e3:.3g} ms per image, with {options.images} images "
        "per GPU."
    )

    def of(images: int) -> list[Update]:
        return updates(traffic, config.training.critic_steps, fixed + each * images)

    whole = of(options.images)
    by_images = {1 << power: of(1 << power) for power in range(17)}
    by_micro_batches = {1 << power: accumulated(of(options.images), 1 << power) for power in range(9)}
    for name, between in (("InfiniBand", options.infiniband), ("Ethernet", options.ethernet)):
        cluster = Cluster(options.per_node, options.inside, between)
        print(f"\n| GPUs, {name} | step, ms | efficiency | images | micro-batches |\n| --- | --- | --- | --- | --- |")
        for gpus in GPUS:
            seconds, share = step_seconds(whole, gpus, cluster), efficiency(whole, gpus, cluster)
            needed = " | ".join(_first_efficient(sizes, gpus, cluster) for sizes in (by_images, by_micro_batches))
            print(f"| {gpus} | {seconds * 1e3:.3g} | {share:.0%} | {needed} |")
    print(
        f"\nimages: smallest power of two per GPU that reaches {EFFICIENT:.0%}. micro-batches: smallest number of "
        f"micro-batches of {options.images} images per GPU that reaches it (training.gradient_accumulation_steps)."
    )


def compare(options: argparse.Namespace, config: Config) -> None:
    """Print one table per type of network between nodes, with a column per engine."""
    by_role = recipe_costs.costs(config, options.classes)
    flops = options.tflops * 1e12
    alone = options.images * recipe_costs.step_flops(config, by_role) / flops
    for role, cost in by_role.items():
        sizes = cost.network
        print(
            f"{role}: {sizes.bytes / 4e6:,.4g} million parameters, in {len(sizes.blocks)} blocks; "
            f"{cost.flops / 1e9:,.4g} GFLOP per sample and forward pass."
        )
    sent = recipe_costs.sent_bytes(config, by_role)
    for role, bytes_ in sent.items():
        print(
            f"{role}: FSDP2 gathers {bytes_['weights'] / 1e9:.3g} GB and reduces {bytes_['gradients'] / 1e9:.3g} GB "
            "per step."
        )
    print(
        f"Computation per step: {alone * 1e3:.3g} ms, with {options.images} images per GPU, at {options.tflops:g} "
        "TFLOP/s."
    )
    for name, between in (("InfiniBand", options.infiniband), ("Ethernet", options.ethernet)):
        cluster = Cluster(options.per_node, options.inside, between)
        columns = " | ".join(f"{engine}, ms" for engine in options.engines)
        print(f"\n| GPUs, {name} | {columns} |\n| --- |{' --- |' * len(options.engines)}")
        for gpus in GPUS[3:]:
            steps = [
                recipe_costs.engine_step(config, by_role, engine, gpus, cluster, options.images, flops)
                for engine in options.engines
            ]
            print(f"| {gpus} | {' | '.join(f'{step * 1e3:.3g} ({alone / step:.0%})' for step in steps)} |")


def _first_efficient(sizes: dict[int, list[Update]], gpus: int, cluster: Cluster) -> str:
    return next((str(size) for size, made in sizes.items() if efficiency(made, gpus, cluster) >= EFFICIENT), "-")


def check(options: argparse.Namespace, traffic: dict[Kind, Traffic], config: Config) -> None:
    """Compare predicted and measured seconds per step, with ranks on two simulated hosts of this machine.

    The computation time is that of as many independent processes at the same time, because ranks share the cores.
    """
    engine = options.engines[0] if options.engines else "ddp"
    by_role = recipe_costs.costs(config, options.classes) if options.engines else None
    print("| ranks | link, Mbit/s | measured, s | predicted, s | error |\n| --- | --- | --- | --- | --- |")
    own = {}
    counts = (4,) if engine == "hsdp" else (2, 4)  # a replica per host
    for ranks in (1, *counts):
        images = config.training.batch_size // ranks
        settings = [*options.settings, *generator_batch(config, images)]
        own[ranks] = speed.alone(options.recipe, settings, images, ranks)
    print(f"| 1 | | {own[1]:.3f} | {own[1]:.3f} | |", flush=True)
    latencies: dict[int, float] = {}
    for megabits in options.check:
        with speed.shaped(megabits) as two:
            for ranks in counts:
                latencies[ranks] = latencies.get(ranks) or speed.latency(two, ranks)
                between = Link(latencies[ranks], megabits / 8 * 1e6)
                # Within a replica, only the messages take time.
                within = Link(between.latency, math.inf)
                cluster = Cluster(2 if engine == "hsdp" else 1, within, between, trees=False)
                if by_role is None:
                    predicted = step_seconds(updates(traffic, config.training.critic_steps, own[ranks]), ranks, cluster)
                else:
                    images = config.training.batch_size // ranks
                    flops = images * recipe_costs.step_flops(config, by_role) / own[ranks]
                    predicted = recipe_costs.engine_step(
                        config, by_role, engine, ranks, cluster, images, flops, overlaps=False
                    )
                measured = speed.together(two, options.recipe, options.settings, ranks, engine)
                error = predicted / measured - 1
                print(f"| {ranks} | {megabits:g} | {measured:.3f} | {predicted:.3f} | {error:+.0%} |", flush=True)
    print(f"\nSeconds by number of ranks: step without communication {own}, message {latencies}.")


def link(text: str) -> Link:
    """Parse `MICROSECONDS:GIGABYTES`: latency per message and GB/s."""
    latency, bandwidth = map(float, text.split(":"))
    return Link(latency / 1e6, bandwidth * 1e9)


def timing(text: str) -> tuple[int, float]:
    """Parse `IMAGES:SECONDS`."""
    images, seconds = text.split(":")
    return int(images), float(seconds)


def refuse_ignored(options: argparse.Namespace) -> None:
    """Exit with one line if an option has no effect beside the others."""
    if options.compute and (options.engines or options.check):
        raise SystemExit(f"--compute: has no effect with {'--check' if options.check else '--engines'}; remove it")
    if options.classes is not None and not options.engines:
        raise SystemExit("--classes: has an effect with --engines only; remove it, or pass --engines")
    if options.tflops is not None and (options.check or not options.engines):
        raise SystemExit("--tflops: has an effect with --engines and without --check only; remove it")
    if options.check and options.engines and len(options.engines) > 1:
        raise SystemExit(f"--engines {' '.join(options.engines)}: --check measures one engine; pass one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="CONFIG")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--images", type=int, default=32, help="batch size per GPU, in images (default: %(default)s)")
    parser.add_argument(
        "--compute",
        nargs="+",
        type=timing,
        metavar="IMAGES:SECONDS",
        help="step times of one GPU at two or more batch sizes (default: measured here at 8 and 32 images)",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=("ddp", "zero1", "zero2", "fsdp", "hsdp"),
        help="compare these engines, from the recipe's networks alone; with --check, measure one of them",
    )
    parser.add_argument("--classes", type=int, help="with --engines: classes of the data (default: 1000)")
    parser.add_argument(
        "--tflops", type=float, help="with --engines: 10^12 operations per second that a GPU achieves (default: 300)"
    )
    parser.add_argument("--per-node", type=int, default=8, metavar="GPUS", help="GPUs per node (default: %(default)s)")
    for name, usual in LINKS.items():
        parser.add_argument(
            f"--{name}", type=link, default=usual, metavar="MICROSECONDS:GIGABYTES",
            help=f"latency per message and GB/s per {'GPU' if name == 'inside' else 'node'} (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--check",
        nargs="+",
        type=float,
        metavar="MBIT",
        help="compare with real ranks on two simulated hosts, at these link speeds in Mbit/s",
    )
    options = parser.parse_intermixed_args()
    if options.check is not None and (reason := speed.why_no_hosts()):
        raise SystemExit(f"--check: {reason}")
    refuse_ignored(options)
    config = load_config(options.recipe, options.settings)
    options.classes = 1000 if options.classes is None else options.classes
    options.tflops = 300.0 if options.tflops is None else options.tflops
    if options.engines and not options.check:
        compare(options, config)
        return
    traffic = {} if options.engines else communication.count(options.recipe, options.settings)[0]
    if options.check:
        check(options, traffic, config)
    else:
        predict(options, traffic, config)


if __name__ == "__main__":
    main()
