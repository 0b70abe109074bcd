"""Measure the cost of R1 and R2: seconds per discriminator update, against an update without them.

All variants train in turn in one process on random images. The output compares medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from distgan.config import parse_config
from distgan.distributed.runtime import Runtime
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import sample_shape
from distgan.players.objective import DiscriminatorObjective
from distgan.players.player import Player
from distgan.players.samples import MicroBatch

DIFFERENCES = {"gamma": 1.0, "method": "finite_difference"}
PENALTIES: dict[str, dict[str, Any] | None] = {
    "no penalty": None,
    "exact": {"gamma": 1.0},
    "differences, antithetic": DIFFERENCES,
    "differences, one-sided": DIFFERENCES | {"antithetic": False},
    "differences, one-sided, a quarter": DIFFERENCES | {"antithetic": False, "fraction": 0.25},
}


def make_update(penalty: dict[str, Any] | None, options: argparse.Namespace, runtime: Runtime) -> Callable[[], object]:
    """Return a function that updates the discriminator once, with this penalty as R1 and R2."""
    network = {"architecture": "r3gan", "width": options.width, "max_width": 4 * options.width}
    config = parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": options.resolution},
            "generator": network,
            "discriminator": network,
            "objective": {"adversarial": "relativistic_paired", "r1": penalty, "r2": penalty},
            "training": {"steps": 1, "batch_size": options.batch_size},
        }
    )
    shape = sample_shape(config.data)
    generator = build_generator(config.generator, shape).to(runtime.device)
    discriminator = build_discriminator(config.discriminator, shape).to(runtime.device)
    latents = torch.randn(options.batch_size, config.generator.latent_size, device=runtime.device)
    reals = torch.rand(options.batch_size, *shape.sizes, device=runtime.device)
    batch = MicroBatch(torch.arange(options.batch_size, device=runtime.device), latents, None, reals, None)
    objective = DiscriminatorObjective(discriminator, generator, config, None)
    player = Player(objective, config.discriminator.optimizer, runtime)
    return lambda: player.update([batch], (0, 0), {"lr": 2e-4})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=32, help="pixels per side (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="width of both networks (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per update (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: %(default)s)")
    options = parser.parse_args()
    runtime = Runtime()
    updates = {name: make_update(penalty, options, runtime) for name, penalty in PENALTIES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in PENALTIES}
    for number in range(options.rounds + 2):
        for name, update in updates.items():
            started = time.perf_counter()
            update()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["no penalty"])
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name:34} {1000 * median:8.1f} ms per update, {median / base:5.2f} times")


if __name__ == "__main__":
    main()
