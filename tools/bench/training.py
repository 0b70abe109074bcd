"""Measure images/s of `distgan train`, with all features on, against a bare PyTorch loop.

Both train the same networks with the same data loading and batch size, on one process and on two (gloo on CPUs, NCCL on
GPUs). The bare loop has two modules in DDP, a loss and two optimizers. It has no EMA, statistics, checks, stateless
noise, checkpoints or logging. Runs alternate. The result of a run is the median over its intervals. The table has the
median and quartiles over runs.

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
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgan import schedule
from distgan.config import Config, load_config
from distgan.data.index.loading import load_index
from distgan.data.stream import open_rank_stream
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import sample_shape
from distgan.players.optimizers import build_optimizer
from distgan.training.setup import uses_channels_last

STEPS_PER_INTERVAL = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each program (default: %(default)s)")
    parser.add_argument(
        "--intervals",
        type=int,
        default=12,
        help=f"intervals of {STEPS_PER_INTERVAL} steps per run (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="process counts (default: 1 2)")
    parser.add_argument("--recipe", default="configs/digits-dcgan.yaml", help="config to train (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of the recipe")
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
    """Format the median and the quartiles."""
    low, median, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def measure(name: str, processes: int, folder: Path, data: Path, options: argparse.Namespace) -> float:
    """Run once in new processes and return images/s."""
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
    config = load_config(options.recipe, options.set)
    folder = Path(options.folder)
    if name == "distgan":
        from distgan.training.loop import train

        train(config)
        # Use the time between rows, which includes sample grids and checkpoints.
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        times = [row["time"] for row in rows if "loss/generator" in row]
    else:
        bare = Bare(config)
        times = list(itertools.islice(bare.intervals(STEPS_PER_INTERVAL), options.intervals))
        bare.close()
    intervals = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    speed = STEPS_PER_INTERVAL * config.training.batch_size / statistics.median(intervals)
    if int(os.environ["RANK"]) == 0:
        (folder / "speed.json").write_text(json.dumps(speed))


class Bare:
    """Bare training loop of a recipe. Under torchrun both networks are in DDP.

    Args:
        config: recipe for images without labels, with the loss `non_saturating`, `hinge` or `relativistic_paired`, the
            latter with equal batches of both players. R1 and R2 are applied in every update, and need a single process.
            Other features of a recipe are ignored.
    """

    def __init__(self, config: Config) -> None:
        cuda, launched = torch.cuda.is_available(), "RANK" in os.environ
        if cuda:  # use the same arithmetic as distgan
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if launched:
            dist.init_process_group("nccl" if cuda else "gloo")
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
        self.config, self.device = config, torch.device("cuda", rank) if cuda else torch.device("cpu")
        self._format = torch.channels_last if uses_channels_last(config, self.device) else torch.contiguous_format
        self.generator, self.discriminator = self._build()
        self._generator, self._discriminator = (
            DistributedDataParallel(network, broadcast_buffers=False) if launched else network
            for network in (self.generator, self.discriminator)
        )
        rates = config.generator.optimizer, config.discriminator.optimizer
        self._optimizers = [
            build_optimizer(rate, list(network.parameters()))
            for network, rate in zip((self.generator, self.discriminator), rates, strict=True)
        ]
        self._stream = open_rank_stream(
            config.data, 0, load_index(config.data.path), start=0, micro_batch=config.training.batch_size,
            rank=rank, world_size=world_size, pin_memory=cuda,
        )  # fmt: skip
        self._world_size = world_size

    def _build(self) -> tuple[nn.Module, nn.Module]:
        """Build the generator and the discriminator on the device."""
        shape = sample_shape(self.config.data)
        networks = (
            build_generator(self.config.generator, shape),
            build_discriminator(self.config.discriminator, shape),
        )
        generator, discriminator = (network.to(self.device).to(memory_format=self._format) for network in networks)
        return generator, discriminator

    def step(self) -> None:
        """Run the discriminator updates and the generator update of one step."""
        for _ in range(self.config.training.critic_steps):
            reals = self._reals()
            self._discriminator_loss(reals).backward()
            self._optimizers[1].step()
            self._optimizers[1].zero_grad()
        if self.config.generator_draws_reals:
            reals = self._reals()
        self.discriminator.requires_grad_(False)
        training = self.config.training
        fake_logits = self.discriminator(self._generator(self._latents(training.generator_batch_size)))
        real_logits = self.discriminator(reals) if self._relativistic else 0
        loss = -fake_logits if self._hinge else F.softplus(real_logits - fake_logits)
        loss.mean().backward()
        self._optimizers[0].step()
        self._optimizers[0].zero_grad()
        self.discriminator.requires_grad_(True)

    def intervals(self, steps: int) -> Iterator[float]:
        """Train without end, and yield the time in seconds after every `steps` steps."""
        while True:
            for _ in range(steps):
                self.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            yield time.time()

    def close(self) -> None:
        """Stop the data loader workers, and leave the process group."""
        self._stream.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _hinge(self) -> bool:
        return self.config.objective.adversarial.family == "hinge"

    @property
    def _relativistic(self) -> bool:
        return self.config.objective.adversarial.family == "relativistic_paired"

    def _reals(self) -> Tensor:
        values = next(self._stream).data.to(self.device, non_blocking=True).float()
        if self.config.data.dequantize:
            return (values / 128 - 1 + torch.rand_like(values) / 128).contiguous(memory_format=self._format)
        return (values / 127.5 - 1).contiguous(memory_format=self._format)

    def _latents(self, batch_size: int | None = None) -> Tensor:
        """Draw this rank's part of a batch of latents; None is the discriminator's batch size."""
        share = (batch_size or self.config.training.batch_size) // self._world_size
        normal = self.config.generator.latent_distribution == "normal"
        draw = torch.randn if normal else torch.rand
        latents = draw(share, self.config.generator.latent_size, device=self.device)
        return latents if normal else 2 * latents - 1

    def _discriminator_loss(self, reals: Tensor) -> Tensor:
        """Return the loss. Real and fake batches are normalized separately, as in distgan and the code of DCGAN."""
        objective = self.config.objective
        with torch.no_grad():
            fakes = self.generator(self._latents())
        sides = [(reals, objective.r1), (fakes, objective.r2)]
        samples = [images.detach().requires_grad_(penalty is not None) for images, penalty in sides]
        real, fake = (self._discriminator(images) for images in samples)
        if self._hinge:
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        elif self._relativistic:
            loss = F.softplus(fake - real).mean()
        else:
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        for (_, penalty), images, logits in zip(sides, samples, (real, fake), strict=True):
            if penalty is not None:
                (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
                loss = loss + schedule.value(penalty.gamma, 0, 1) / 2 * gradient.square().flatten(1).sum(1).mean()
        return loss


if __name__ == "__main__":
    main()
