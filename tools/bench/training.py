"""Images per second of `distgan train`, everything on, against a bare hand-written PyTorch loop.

Both train the same networks on the same data path with the same batch, at one process and at two (gloo on CPUs, NCCL
on GPUs). The bare loop is what one would write for a benchmark: two modules in DDP, a loss, two optimizers; no
averaging, no statistics, no checks, no addressed noise, no checkpoints, no logging. Runs alternate; a run's figure is
the median over its intervals, and each opponent's the median of its runs with their quartiles.

    python tools/bench/training.py --runs 5
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS_PER_INTERVAL = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each opponent; default %(default)s")
    parser.add_argument(
        "--intervals", type=int, default=12, help=f"of {STEPS_PER_INTERVAL} steps in a run; default %(default)s"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--recipe", default="configs/digits-dcgan.yaml", help="default %(default)s")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    parser.add_argument("--worker", choices=("bare", "distgan"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options)
        return
    print("| processes | bare PyTorch, img/s | distgan, img/s | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        subprocess.run(
            [sys.executable, "-m", "distgan", "pack", "builtin:digits", str(data), "--resolution", "32"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for processes in options.processes:
            speeds: dict[str, list[float]] = {"bare": [], "distgan": []}
            for run in range(options.runs):
                for name in ("bare", "distgan") if run % 2 == 0 else ("distgan", "bare"):
                    speeds[name].append(measure(name, processes, Path(folder), data, options))
            ratio = statistics.median(speeds["distgan"]) / statistics.median(speeds["bare"])
            print(f"| {processes} | {show(speeds['bare'])} | {show(speeds['distgan'])} | {ratio:.3f} |", flush=True)


def show(speeds: list[float]) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def measure(name: str, processes: int, folder: Path, data: Path, options: argparse.Namespace) -> float:
    """One run in processes of its own; images per second."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        settings = [
            f"run_dir={run}/run", f"data.path={data}", f"training.steps={STEPS_PER_INTERVAL * options.intervals}",
            f"monitoring.every={STEPS_PER_INTERVAL}", "evaluation.every=0", *options.set,
        ]  # fmt: skip
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__,
            "--worker", name, "--folder", run, "--recipe", options.recipe, "--set", *settings,
        ]  # fmt: skip
        threads = max(1, (os.cpu_count() or 1) // processes)
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        result: float = json.loads((Path(run) / "speed.json").read_text())
        return result


def work(name: str, options: argparse.Namespace) -> None:
    from distgan.config import load_config

    config = load_config(options.recipe, options.set)
    folder = Path(options.folder)
    if name == "distgan":
        from distgan.training.loop import train

        train(config)
        # Wall clock between rows: sample grids and checkpoints are in it.
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        times = [row["time"] for row in rows if "loss/generator" in row]
    else:
        times = bare(config)
    intervals = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    speed = STEPS_PER_INTERVAL * config.training.batch_size / statistics.median(intervals)
    if int(os.environ["RANK"]) == 0:
        (folder / "speed.json").write_text(json.dumps(speed))


def bare(config) -> list[float]:  # type: ignore[no-untyped-def]
    """The loop one writes by hand. Returns the time after each interval."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from distgan.data.index import load_index
    from distgan.data.stream import open_stream
    from distgan.networks import build_discriminator, build_generator
    from distgan.networks.shape import sample_shape

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    shape = sample_shape(config.data)
    generator = build_generator(config.generator, shape).to(device)
    discriminator = build_discriminator(config.discriminator, shape).to(device)
    ddp_generator = DistributedDataParallel(generator, broadcast_buffers=False)
    ddp_discriminator = DistributedDataParallel(discriminator, broadcast_buffers=False)
    rates = config.generator.optimizer, config.discriminator.optimizer
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=rate.learning_rate, betas=rate.betas, fused=True)
        for network, rate in zip((generator, discriminator), rates, strict=True)
    ]
    stream = open_stream(
        config.data, 0, load_index(config.data.path), start=0, micro_batch=config.training.batch_size,
        rank=rank, world_size=world_size, pin_memory=cuda,
    )  # fmt: skip
    share = config.training.batch_size // world_size
    times = []
    for step in range(config.training.steps):
        reals = next(stream).values.to(device, non_blocking=True).float() / 127.5 - 1
        latents = 2 * torch.rand(share, config.generator.latent_size, device=device) - 1
        with torch.no_grad():
            fakes = generator(latents)
        # Reals and fakes apart, each normalised by its own statistics, as distgan and the DCGAN papers' code do.
        loss = F.softplus(-ddp_discriminator(reals)).mean() + F.softplus(ddp_discriminator(fakes)).mean()
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        discriminator.requires_grad_(False)
        latents = 2 * torch.rand(share, config.generator.latent_size, device=device) - 1
        F.softplus(-discriminator(ddp_generator(latents))).mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        discriminator.requires_grad_(True)
        if (step + 1) % STEPS_PER_INTERVAL == 0:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.time())
    stream.close()
    dist.destroy_process_group()
    return times


if __name__ == "__main__":
    main()
