"""Time FID from feature batches: distgan, torchmetrics and torch-fidelity, cold and with the real side cached.

- cold: compute the distance from batches of real and generated features.
- reals known: compute it from batches of generated features and what each program caches of the real side: distgan the
  factor, torchmetrics its sums (`reset_real_features=False`), torch-fidelity its statistics.
- distance alone: compute it from the means and covariances of both sides, and for distgan the factor.

The time of general eigensolvers depends on the spectrum. So there are two: features with equal standard deviations, and
with standard deviations that span two decades. Programs take turns. Times are medians over rounds. Ratios are medians
of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from distgan.evaluation.metrics.frechet import FrechetDistanceToReference, frechet_distance, make_reference
from distgan.evaluation.moments import Gaussian, Moments

Batches = tuple[Tensor, ...]
PROGRAMS = "distgan", "torchmetrics", "torch-fidelity"


class _FeaturesAsTheyAre(nn.Module):
    """Identity that torchmetrics uses as its feature extractor."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.num_features = dimension

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass
class Task:
    """Task for all programs, with the seconds of each round and the computed distance."""

    name: str
    run: dict[str, Callable[[], float]]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {program: [] for program in PROGRAMS})
    found: dict[str, float] = field(default_factory=dict)

    def measure(self, clock: Callable[[], float]) -> None:
        for program, run in self.run.items():
            start = clock()
            self.found[program] = run()
            self.seconds[program].append(clock() - start)

    def row(self) -> str:
        ours = self.seconds["distgan"]
        cells = [f"{statistics.median(ours):.2f} s"]
        for program in PROGRAMS[1:]:
            theirs = self.seconds[program]
            ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
            error = abs(self.found["distgan"] / self.found[program] - 1)
            cells.append(f"{statistics.median(theirs):.2f} s, {ratio:.1f}x, {error:.0e}")
        return f"| {self.name} | {' | '.join(cells)} |"


def make_features(samples: int, dimension: int, decades: float, seed: int) -> Tensor:
    """Return correlated float32 features, shape (samples, dimension).

    Args:
        decades: decimal logarithm of the ratio of the largest to the smallest principal standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(0)))[0]
    deviations = torch.logspace(0, -decades, dimension) * (1 + 0.1 * seed)
    features: Tensor = torch.randn(samples, dimension, generator=generator) * deviations @ basis + 0.4
    return features


def moments_of(batches: Batches) -> Gaussian:
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments.compute()


def torchmetrics_of(real: Batches) -> FrechetInceptionDistance:
    metric = FrechetInceptionDistance(feature=_FeaturesAsTheyAre(real[0].shape[1]), reset_real_features=False)
    metric.set_dtype(torch.float64)
    for batch in real:
        metric.update(batch, real=True)
    return metric


def make_tasks(real: Batches, made: Batches, spectrum: str) -> list[Task]:
    sides = moments_of(real), moments_of(made)
    reference = make_reference(sides[0])
    known = torchmetrics_of(real)
    theirs = [fid_features_to_statistics(torch.cat(side).double()) for side in (real, made)]

    def distgan(kept: bool) -> float:
        metric = FrechetDistanceToReference(reference if kept else make_reference(moments_of(real)))
        for batch in made:
            metric.update(batch)
        return float(metric.compute())

    def torchmetrics(kept: bool) -> float:
        metric = known if kept else torchmetrics_of(real)
        metric.reset()  # resets only the generated side
        for batch in made:
            metric.update(batch, real=False)
        return float(metric.compute())

    def torch_fidelity(kept: bool) -> float:
        real_side = theirs[0] if kept else fid_features_to_statistics(torch.cat(real).double())
        made_side = fid_features_to_statistics(torch.cat(made).double())
        return float(fid_statistics_to_metric(real_side, made_side, verbose=False)["frechet_inception_distance"])

    def from_features(kept: bool) -> dict[str, Callable[[], float]]:
        programs = distgan, torchmetrics, torch_fidelity
        return {name: lambda run=run: run(kept) for name, run in zip(PROGRAMS, programs, strict=True)}  # type: ignore[misc]

    alone: dict[str, Callable[[], float]] = {
        "distgan": lambda: float(frechet_distance(reference, sides[1])),
        "torchmetrics": lambda: float(
            _compute_fid(sides[0].mean, sides[0].covariance, sides[1].mean, sides[1].covariance)
        ),
        "torch-fidelity": lambda: fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"],
    }
    named = {"cold": from_features(False), "reals known": from_features(True), "distance alone": alone}
    return [Task(f"{name}, {spectrum}", run) for name, run in named.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000, help="samples per side (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=2048, help="features per sample (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per program (default: %(default)s)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the CPU time of one thread, for a shared machine"
    )
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    print(f"{arguments.samples} x {arguments.dimension} float32 per side, batches of {arguments.batch_size},", end=" ")
    print(f"{torch.get_num_threads()} threads. Other programs: seconds, ratio to distgan, relative difference.\n")
    print("| task | distgan | torchmetrics | torch-fidelity |\n| --- | --- | --- | --- |")
    for spectrum, decades in (("equal deviations", 0.0), ("over two decades", 2.0)):
        real, made = (
            make_features(arguments.samples, arguments.dimension, decades, seed).split(arguments.batch_size)
            for seed in (1, 2)
        )
        tasks = make_tasks(real, made, spectrum)
        for _ in range(arguments.rounds):
            for task in tasks:
                task.measure(clock)
        print("\n".join(task.row() for task in tasks), flush=True)


if __name__ == "__main__":
    main()
