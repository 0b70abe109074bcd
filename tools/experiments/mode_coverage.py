"""Measure the modes that each objective covers on an equal budget: the ring of 8 and the grid of 25 Gaussians.

PacGAN's protocol (Lin et al. 2018, section 4.1): train on 100,000 points and generate 2,500. A generated point within
three standard deviations of the nearest mode is of high quality. A mode with at least one such point is covered.

All objectives have the same number of discriminator updates, so they see the same real points. Objectives with several
critic steps have fewer generator updates. Networks, optimizer and seeds are equal unless the table says otherwise.

All steps use the command line. Finished runs are not repeated: to repeat one, delete its folder in runs/theory/.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..commands import ROOT, distgan

RUNS = ROOT / "runs" / "theory"
UPDATES = 8000
SEEDS = (0,)
MIXTURES = {"ring": (8, 1.5), "grid": (25, 5.5)}
"""Mixture -> number of modes, and half the side of the area that its picture shows."""

_CRITIC = ("objective.adversarial=wasserstein", "training.critic_steps=5")
_RMSPROP = tuple(
    f"{role}.optimizer={{name: rmsprop, learning_rate: 5.0e-4}}" for role in ("generator", "discriminator")
)
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "minimax": ("objective.adversarial=minimax",),
    "non-saturating": (),
    "one-sided label smoothing": ("objective.label_smoothing={real: 0.9}",),
    "instance noise, falling to 0": ("objective.instance_noise={sigma: {start: 0.5, end: 0}}",),
    "historical averaging, 0.01": ("objective.historical_averaging={generator: 0.01, discriminator: 0.01}",),
    "feature matching": ("objective.feature_matching={}",),
    "minibatch discrimination, 20 kernels": ("discriminator.minibatch_discrimination={kernels: 20}",),
    "least squares": ("objective.adversarial=least_squares",),
    "hinge, spectral norm": ("objective.adversarial=hinge", "discriminator.spectral_norm=true"),
    "relativistic average": ("objective.adversarial=relativistic_average",),
    "R1, gamma 0.1": ("objective.r1={gamma: 0.1}",),
    "relativistic paired, R1 and R2, gamma 0.1": (
        "objective.adversarial=relativistic_paired", "objective.r1={gamma: 0.1}", "objective.r2={gamma: 0.1}",
    ),
    "DRAGAN, lambda 1": ("objective.gradient_penalty={weight: 1, points: uniform}",),
    "WGAN, RMSProp 5e-4, c 0.01": (*_CRITIC, *_RMSPROP, "objective.weight_clipping={limit: 0.01}"),
    "WGAN-GP, lambda 0.1": (*_CRITIC, "objective.gradient_penalty={weight: 0.1}"),
}  # fmt: skip


def main(folder: Path) -> None:
    """Run the missing trainings, then write the table and a picture per mixture."""
    columns: dict[str, dict[str, list[float]]] = {}
    for mixture, (modes, reach) in MIXTURES.items():
        data = ROOT / "datasets" / mixture
        if not data.exists():
            distgan("pack", f"builtin:{mixture}", str(data))
        outcomes = {name: [_coverage(mixture, name, seed) for seed in SEEDS] for name in OBJECTIVES}
        columns[f"{mixture}: modes of {modes}"] = {name: [row[0] for row in rows] for name, rows in outcomes.items()}
        columns[f"{mixture}: share of high quality"] = {
            name: [row[1] for row in rows] for name, rows in outcomes.items()
        }
        _panels({name: _points(mixture, name) for name in OBJECTIVES}, reach, folder / f"mode-coverage-{mixture}.png")
    (folder / "mode-coverage.md").write_text(_table(columns))
    print(_table(columns))


def _run(mixture: str, name: str, seed: int) -> Path:
    short = "-".join("".join(letter if letter.isalnum() else " " for letter in name).lower().split())
    return RUNS / mixture / f"{short}-{seed}"


def _coverage(mixture: str, name: str, seed: int) -> tuple[float, float]:
    """Train unless it is done. Return the number of covered modes and the fraction of high-quality points."""
    run, overrides = _run(mixture, name, seed), OBJECTIVES[name]
    steps = UPDATES // (5 if "training.critic_steps=5" in overrides else 1)
    result = run / "metrics.jsonl"
    if not any("modes" in row and row["step"] == steps for row in _rows(result)):
        print(f"{mixture}: {name}, seed {seed}", flush=True)
        distgan(
            "train", "configs/ring.yaml", f"run_dir={run}", f"data.path=datasets/{mixture}", f"seed={seed}",
            f"training.steps={steps}", f"evaluation.every={steps}", f"checkpoint.every={steps}",
            f"monitoring.samples_every={steps}", "monitoring.tensorboard=false", *overrides,
        )  # fmt: skip
    (row,) = [row for row in _rows(result) if row["step"] == steps and "modes" in row]
    return row["modes"], row["modes_high_quality"]


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _points(mixture: str, name: str) -> NDArray[np.float32]:
    """Generate points with the run of the first seed: float32, shape (2500, 2)."""
    run = _run(mixture, name, SEEDS[0])
    distgan("sample", str(run), "--num", "2500", "--out", str(run / "points.npy"))
    points: NDArray[np.float32] = np.load(run / "points.npy", allow_pickle=False)
    return points


def _panels(clouds: dict[str, NDArray[np.float32]], reach: float, path: Path) -> None:
    """Draw all clouds of points in rows. Each picture shows the square from -reach to reach."""
    side, columns = 220, 5
    sheet = Image.new("RGB", (columns * side, -(-len(clouds) // columns) * (side + 18)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (name, points) in enumerate(clouds.items()):
        left, upper = number % columns * side, number // columns * (side + 18)
        canvas.text((left + side / 2, upper + 4), name, fill="black", font=font, anchor="mt")
        canvas.rectangle((left + 4, upper + 20, left + side - 4, upper + side + 12), outline="#bbbbbb")
        for x, y in points[(np.abs(points) < reach).all(axis=1)] / (2 * reach):
            center = (left + side / 2 + x * (side - 12), upper + side / 2 + 16 - y * (side - 12))
            canvas.rectangle((*center, center[0] + 1, center[1] + 1), fill="#4477aa")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _table(columns: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table of the means over the seeds."""
    lines = [
        f"{UPDATES:,} discriminator updates of {_batch()} points, mean over {len(SEEDS)} run(s). Of 2,500 generated",
        "points, those within three standard deviations of the nearest mode are of high quality. A mode is covered if",
        "one of them is at it (Lin et al. 2018). `make theory` writes this page.",
        "",
        "| objective | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name in OBJECTIVES:
        cells = [f"{mean(values[name]):.1%}" if "share" in column else f"{mean(values[name]):.1f}"
                 for column, values in columns.items()]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _batch() -> int:
    from distgan.config import load_config

    return load_config(ROOT / "configs" / "ring.yaml").training.batch_size
