"""Measure startup times: seconds of `distgan --help`, and seconds from the command to the first training step.

The baselines are unavoidable: starting Python, and importing torch and Accelerate. Measurements take turns. The table
has medians, and medians of the ratios to the baseline of the same round.

    python tools/bench/startup.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: %(default)s)")
    parser.add_argument("--recipe", default="configs/digits-dcgan.yaml", help="config to train (default: %(default)s)")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"python": [], "help": [], "imports": [], "first step": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        call("-m", "distgan", "pack", "builtin:digits", str(data), "--resolution", "32")
        for number in range(options.rounds):
            seconds["python"].append(call("-c", "import argparse"))
            seconds["help"].append(call("-m", "distgan", "--help"))
            seconds["imports"].append(call("-c", "import torch, accelerate"))
            run = Path(folder) / f"run-{number}"
            started = time.time()
            call(
                "-m", "distgan", "train", options.recipe, f"data.path={data}", f"run_dir={run}", "training.steps=1",
                "monitoring.every=1", "evaluation.every=0", "monitoring.samples_every=1000000",
            )  # fmt: skip
            row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
            seconds["first step"].append(row["time"] - started)
    print("| from the command to | seconds | baseline | seconds | ratio |\n| --- | --- | --- | --- | --- |")
    for name, opponent in (("help", "python"), ("first step", "imports")):
        ratios = [mine / other for mine, other in zip(seconds[name], seconds[opponent], strict=True)]
        print(
            f"| {name} | {statistics.median(seconds[name]):.2f} | {opponent} | "
            f"{statistics.median(seconds[opponent]):.2f} | {statistics.median(ratios):.2f} |"
        )


def call(*arguments: str) -> float:
    """Run Python with these arguments. Return the seconds that it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
