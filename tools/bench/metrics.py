"""Compare precision, recall, density and coverage with prdc: time and memory, on the same features.

    python tools/bench/metrics.py

Features are normal. Programs take turns, each time in a process of its own. Times are medians over rounds, without
imports. Ratios are medians of the ratios within a round: prdc's time divided by distgan's. prdc always computes all
four values. A later evaluation of a run knows the real radii. Memory is the peak above the features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Values = dict[str, float]
TASKS = {
    "precision, recall, density, coverage": ("precision_recall", "density_coverage"),
    "precision, recall": ("precision_recall",),
    "density, coverage": ("density_coverage",),
}


def make_features(count: int, dimension: int) -> tuple[Tensor, Tensor]:
    """Return real and generated features, float32, shape (count, dimension) each."""
    draws = torch.Generator().manual_seed(0)
    return torch.randn(count, dimension, generator=draws), 0.9 * torch.randn(count, dimension, generator=draws) + 0.05


def prepare_distgan(
    reals: Tensor, fakes: Tensor, k: int, metrics: tuple[str, ...], later: bool
) -> Callable[[], Values]:
    from distgan.distributed.runtime import Runtime
    from distgan.evaluation.metrics.density_coverage import ManifoldDensityCoverage
    from distgan.evaluation.metrics.precision_recall import ManifoldPrecisionRecall

    classes = {"precision_recall": ManifoldPrecisionRecall, "density_coverage": ManifoldDensityCoverage}
    made = [classes[name](reals, k, Runtime()) for name in metrics]

    def compute() -> Values:
        values: Values = {}
        for metric in made:
            metric.reset()
            metric.update(fakes, torch.arange(len(fakes)))
            values |= {name: float(value) for name, value in metric.compute().items()}
        return values

    if later:
        compute()
    return compute


def prepare_prdc(reals: Tensor, fakes: Tensor, k: int) -> Callable[[], Values]:
    from prdc import compute_prdc

    return lambda: {name: float(value) for name, value in compute_prdc(reals.numpy(), fakes.numpy(), k).items()}


def memory(key: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) / 1024


def measure_here(arguments: argparse.Namespace) -> None:
    """Measure one program once and print JSON."""
    reals, fakes = make_features(arguments.samples, arguments.dimension)
    program, task, later = arguments.program
    if program == "prdc":
        run = prepare_prdc(reals, fakes, arguments.neighbors)
    else:
        run = prepare_distgan(reals, fakes, arguments.neighbors, TASKS[task], later == "later")
    torch.randn(64, 64) @ torch.randn(64, 64)  # starts the threads
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    values = run()
    seconds = (time.process_time() - cpu) if arguments.cpu_time else (time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "memory": memory("VmHWM") - before, "values": values}))


def measured(program: str, task: str, later: str) -> dict[str, float | Values]:
    command = [sys.executable, __file__, *sys.argv[1:], "--program", program, task, later]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    found: dict[str, float | Values] = json.loads(said.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000, help="samples per side (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=512, help="features per sample (default: %(default)s)")
    parser.add_argument("--neighbors", type=int, default=5, help="k (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per program (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time, for a shared machine")
    parser.add_argument("--program", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        measure_here(arguments)
        return
    cases = [(task, later) for later in ("first", "later") for task in TASKS]
    rounds = [
        {"prdc": measured("prdc", "", ""), **{case: measured("distgan", *case) for case in cases}}
        for _ in range(arguments.rounds)
    ]

    def median(of: str, key: object) -> float:
        return statistics.median(float(found[key][of]) for found in rounds)

    print(f"2 x {arguments.samples} x {arguments.dimension} float32, k = {arguments.neighbors}\n")
    print("| values | evaluation | distgan | prdc | ratio | memory |\n| --- | --- | --- | --- | --- | --- |")
    theirs = rounds[0]["prdc"]["values"]
    for case in cases:
        ours = rounds[0][case]["values"]
        assert isinstance(ours, dict)
        assert isinstance(theirs, dict)
        error = max(abs(value - theirs[name]) for name, value in ours.items())
        assert error < 1e-3, (ours, theirs)
        ratio = statistics.median(found["prdc"]["seconds"] / found[case]["seconds"] for found in rounds)
        print(
            f"| {case[0]} | {case[1]} | {median('seconds', case):.2f} s | {median('seconds', 'prdc'):.2f} s | "
            f"{ratio:.2f} | {median('memory', case):.0f} against {median('memory', 'prdc'):.0f} MB |"
        )


if __name__ == "__main__":
    main()
