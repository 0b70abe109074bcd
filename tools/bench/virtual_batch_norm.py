"""Measure the cost of virtual batch norm: seconds per generator and discriminator update, against batch norm.

All variants train in turn in one process on random images. The output compares medians over rounds. With virtual batch
norm in the generator, each update of either network passes the reference batch through the generator once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from distgan.config import Config, parse_config
from distgan.distributed.runtime import Runtime
from distgan.inference.latents import LatentSource
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.virtual_batch_norm import set_reference, uses_reference
from distgan.networks.shape import sample_shape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.player import Player
from distgan.players.samples import MicroBatch

KINDS = {
    "batch norm": ("batch", "batch"),
    "virtual in the generator": ("virtual", "batch"),
    "virtual in both": ("virtual", "virtual"),
}


def make_step(kinds: tuple[str, str], options: argparse.Namespace, runtime: Runtime) -> Callable[[], None]:
    """Return a function that updates each player once.

    Args:
        kinds: normalizations of the generator and the discriminator.
    """
    config: Config = parse_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused", "resolution": options.resolution},
            "generator": {"width": options.width, "normalization": kinds[0]},
            "discriminator": {"width": options.width, "normalization": kinds[1]},
            "training": {"steps": 1, "batch_size": options.batch_size},
        }
    )
    shape = sample_shape(config.data)
    generator = build_generator(config.generator, shape).to(runtime.device)
    discriminator = build_discriminator(config.discriminator, shape).to(runtime.device)
    source = LatentSource(config.generator, 0, class_counts=None, device=runtime.device)
    places = torch.arange(options.batch_size, device=runtime.device)
    latents, _ = source.draw("latents", places)
    reals = torch.rand(options.batch_size, *shape.sizes, device=runtime.device)
    for network, samples in ((generator, latents), (discriminator, reals)):
        if uses_reference(network):
            set_reference(network, samples, None)
    batch = MicroBatch(places, latents, None, reals, None)
    players = (
        Player(DiscriminatorObjective(discriminator, generator, config, None), config.discriminator.optimizer, runtime),
        Player(GeneratorObjective(generator, discriminator, config, None), config.generator.optimizer, runtime),
    )

    def step() -> None:
        players[0].update([batch], (0, 1), {"lr": 2e-4})
        players[1].update([batch], (0,), {"lr": 2e-4})

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=32, help="pixels per side (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="width of both networks (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per update (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    options = parser.parse_args()
    runtime = Runtime()
    steps = {name: make_step(kinds, options, runtime) for name, kinds in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for number in range(options.rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["batch norm"])
    for name, found in seconds.items():
        print(
            f"{name:26} {1000 * statistics.median(found):8.1f} ms per step, "
            f"{statistics.median(found) / base:5.2f} times"
        )


if __name__ == "__main__":
    main()
