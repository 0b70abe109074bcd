"""Measure how long a checkpoint stalls training: distgan's writer against a blocking `torch.save` of the same state.

The "training" is a fixed number of matrix products and in-place updates of the state between checkpoints, so that the
background write competes with it for cores and memory. `torch.save` writes one file and renames it, in one variant with
an fsync, which distgan always does. Variants alternate. The output has medians and quartiles.

    python tools/bench/checkpoint_stall.py --rounds 5
    OMP_NUM_THREADS=1 python tools/bench/checkpoint_stall.py --rounds 5     # leaves a core to the writer
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from distgan.checkpoint.writer import CheckpointWriter
from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import SampleShape

Files = dict[str, dict[str, torch.Tensor]]


def make_state(width: int, device: str) -> Files:
    """State of a 64-pixel DCGAN run: both networks, the generator's EMA, and two Adam moments of each network."""
    shape = SampleShape(resolution=64, channels=3)
    built = {
        "generator": build_generator(GeneratorConfig.model_validate({"width": width}), shape),
        "discriminator": build_discriminator(DiscriminatorConfig.model_validate({"width": width}), shape),
    }
    generator, discriminator = (
        {name: tensor.detach().clone().to(device) for name, tensor in network.state_dict().items()}
        for network in built.values()
    )

    def moments(network: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{moment}": torch.rand_like(tensor)
            for name, tensor in network.items()
            for moment in ("exp_avg", "exp_avg_sq")
            if tensor.is_floating_point()
        }

    return {
        "generator": generator,
        "discriminator": discriminator,
        "generator_ema": {name: tensor.clone() for name, tensor in generator.items()},
        "generator_optimizer": moments(generator),
        "discriminator_optimizer": moments(discriminator),
    }


class Training:
    """Simulated training between checkpoints."""

    def __init__(self, files: Files, device: str) -> None:
        self.tensors = [tensor for tensors in files.values() for tensor in tensors.values()]
        self.tensors = [tensor for tensor in self.tensors if tensor.is_floating_point()]
        self.factor = torch.randn(1024, 1024, device=device) / 32
        self.value = torch.randn(1024, 1024, device=device)
        self.device = device

    def steps(self, number: int, before_change: Callable[[], None] = lambda: None) -> float:
        """Run `number` steps. Return the total seconds of `before_change`, which is called before each update."""
        waited = 0.0
        for _ in range(number):
            for _ in range(4):
                self.value = torch.tanh(self.value @ self.factor)
            before = time.perf_counter()
            before_change()
            waited += time.perf_counter() - before
            torch._foreach_mul_(self.tensors, 0.999)
        self.wait()
        return waited

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


Run = tuple[list[float], float]
"""Seconds of each stall, and total seconds until the last byte is on disk."""


def with_distgan(training: Training, files: Files, folder: Path, checkpoints: int, steps: int) -> Run:
    """Measure distgan's writer.

    A stall is the time of `save`, plus the time that the next update waits for the copy in the background.
    """
    stalls: list[float] = []
    started = time.perf_counter()
    with closing(CheckpointWriter(folder, keep=2)) as writer:
        for number in range(1, checkpoints + 1):
            waited = training.steps(steps, writer.copied)
            if stalls:
                stalls[-1] += waited
            before = time.perf_counter()
            writer.wait()  # a slow disk counts as a stall, and no checkpoint is skipped
            writer.save(number, files, {"step": number})
            training.wait()
            stalls.append(time.perf_counter() - before)
        stalls[-1] += training.steps(1, writer.copied)
    assert not writer.failures
    return stalls, time.perf_counter() - started


def with_torch_save(training: Training, files: Files, folder: Path, checkpoints: int, steps: int, *, sync: bool) -> Run:
    """Measure a blocking `torch.save`."""
    stalls = []
    started = time.perf_counter()
    for number in range(1, checkpoints + 1):
        training.steps(steps)
        before = time.perf_counter()
        path = folder / f"step-{number:08d}.pt"
        with open(f"{path}.tmp", "wb") as file:
            torch.save({"files": files, "state": {"step": number}}, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        stalls.append(time.perf_counter() - before)
        if number > 2:
            (folder / f"step-{number - 2:08d}.pt").unlink()
    return stalls, time.perf_counter() - started


def without(training: Training, files: Files, folder: Path, checkpoints: int, steps: int) -> Run:
    """Measure the training without checkpoints."""
    started = time.perf_counter()
    for _ in range(checkpoints):
        training.steps(steps)
    return [0.0], time.perf_counter() - started


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values if len(values) > 1 else values * 2, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--width",
        type=int,
        default=96,
        help="channels of both networks; 96 gives 200 MB of state (default: %(default)s)",
    )
    parser.add_argument("--checkpoints", type=int, default=10, help="checkpoints per run (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.5,
        help="approximate training time between checkpoints (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--folder", help="folder to write to (default: a temporary folder)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = make_state(arguments.width, device)
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    training = Training(files, device)
    training.steps(3)
    before = time.perf_counter()
    training.steps(5)
    steps = max(1, round(arguments.seconds / ((time.perf_counter() - before) / 5)))
    variants: dict[str, Callable[..., Run]] = {
        "no checkpoints": without,
        "torch.save": lambda *a: with_torch_save(*a, sync=False),
        "torch.save + fsync": lambda *a: with_torch_save(*a, sync=True),
        "distgan": with_distgan,
    }
    stalls: dict[str, list[float]] = {name: [] for name in variants}
    totals: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds):
        for name, run in sorted(variants.items(), reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                stall, total = run(training, files, Path(folder), arguments.checkpoints, steps)
            stalls[name] += stall
            totals[name].append(total)
    print(
        f"{size / 1e6:.0f} MB of state on {device}, {arguments.checkpoints} checkpoints, {steps} steps between them, "
        f"{arguments.rounds} rounds, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}. Median (quartiles), seconds.\n"
    )
    print("| | stall per checkpoint | ratio | total | ratio |\n| --- | --- | --- | --- | --- |")
    reference_stall, reference_total = statistics.median(stalls["torch.save"]), statistics.median(totals["torch.save"])
    for name in variants:
        print(
            f"| {name} | {quartiles(stalls[name])} | {statistics.median(stalls[name]) / reference_stall:.3f} "
            f"| {quartiles(totals[name])} | {statistics.median(totals[name]) / reference_total:.3f} |"
        )


if __name__ == "__main__":
    main()
