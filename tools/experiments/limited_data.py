"""Measure what augmentation does for a discriminator that has a tenth of CIFAR-10: FID over training, and after it.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", figure 1: with few images FID falls
and then rises again, because the discriminator overfits to them. Augmentation delays that.

All steps use the command line. Finished runs are not repeated: to repeat one, delete its folder in runs/limited-data/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..charts import Chart, Curve, draw
from ..commands import ROOT, distgan

RUNS = ROOT / "runs" / "limited-data"
DATA, TENTH = "datasets/cifar10-tenths", "datasets/cifar10-tenths/shard-000000.tar"
PACK = f"distgan pack cifar10-train.zip {DATA} --shard-size 5000"
SAMPLES = 5000
ADA = "objective.augmentation={augmentation: ada, probability: adaptive, controller: {kimg: 100}}"
DIFFAUGMENT = "objective.augmentation={augmentation: diffaugment, policy: [translation, cutout]}"
CURVES = (
    ("50,000 images", "all", [f"data.path={DATA}"]),
    ("5,000 images", "tenth", [f"data.path={TENTH}"]),
    ("5,000 images, ADA", "tenth-ada", [f"data.path={TENTH}", ADA]),
)
CURVE, CURVE_STEPS, CURVE_POINTS = "cifar10-dcgan-small", 2600, 4
"""Recipe of the plot, its steps of 128 images, and the number of its evaluations."""


class Row(NamedTuple):
    """Recipe of the table: its steps, and how it is augmented."""

    name: str
    recipe: str
    steps: int
    augmentation: str
    override: str


ROWS = (
    Row("R3GAN", "cifar10-r3gan-small", 470, "ADA, scheduled", ""),
    Row("BigGAN", "cifar10-biggan-small", 100, "DiffAugment", DIFFAUGMENT),
    Row("SNGAN, projection", "cifar10-cgan-pd-small", 160, "DiffAugment", DIFFAUGMENT),
    Row("StyleGAN2", "cifar10-stylegan2-small", 1250, "ADA, adaptive", ""),
)
WITHOUT = "objective.augmentation=null"
AVERAGE = "ema.half_life_kimg={start: 0, end: 10, over: 200, shape: linear}"
"""Half-life of 5 % of the images so far. R3GAN's curve is in images, and longer than these runs."""


def main(folder: Path) -> None:
    """Run the missing trainings, then write the table and the plot."""
    curves: list[Curve] = []
    for label, name, overrides in CURVES:
        points = list(_curve(name, *overrides))
        curves.append(Curve(label, [x for x, _ in points], [y for _, y in points], len(curves)))
    top = 1.1 * max(max(curve.y) for curve in curves)
    chart = Chart("FID[classifier], DCGAN, CIFAR-10", "thousands of images", curves, (0.0, top))
    draw([chart], folder / "limited-data.png", columns=1)
    page = _page(list(_table()), curves)
    (folder / "limited-data.md").write_text(page)
    print(page)


def _curve(name: str, *overrides: str) -> Iterator[tuple[float, float]]:
    """Train the recipe of the plot unless it is done. Yield thousands of images and FID of its checkpoints."""
    every = CURVE_STEPS // CURVE_POINTS
    run = _trained(name, CURVE, CURVE_STEPS, f"checkpoint.every={every}", f"checkpoint.keep={CURVE_POINTS}", *overrides)
    for step in range(every, CURVE_STEPS + 1, every):
        yield 128 * step / 1000, _fid(run, step)


def _table() -> Iterator[tuple[str, int, str, list[float]]]:
    """Yield the name, images, augmentation and FIDs of each row: of a tenth of the images, without and with it."""
    for row in ROWS:
        found, images = [], 0
        for variant, augmentation in (("plain", WITHOUT), ("augmented", row.override)):
            run = _trained(
                f"{row.recipe}-{variant}", row.recipe, row.steps, f"checkpoint.every={row.steps}", f"data.path={TENTH}",
                AVERAGE, *[augmentation] * bool(augmentation),
            )  # fmt: skip
            found.append(_fid(run, row.steps))
            images = int(_rows(run)[-1]["images"])
        yield row.name, images, row.augmentation, found


def _trained(name: str, recipe: str, steps: int, *overrides: str) -> Path:
    """Train unless it is done. Return the run's folder."""
    run = RUNS / name
    if not (run / "checkpoints" / f"step-{steps:08}").exists():
        print(name, flush=True)
        distgan(
            "train", f"configs/{recipe}.yaml", f"run_dir={run}", f"training.steps={steps}", "evaluation.every=0",
            f"monitoring.samples_every={steps}", "monitoring.tensorboard=false", "data.num_workers=0", *overrides,
        )  # fmt: skip
    return run


def _fid(run: Path, step: int) -> float:
    """Return the FID of a checkpoint against all images, measured once."""
    kept = run / f"fid-{step}.json"
    if not kept.exists():
        kept.write_text(
            distgan(
                "evaluate", str(run / "checkpoints" / f"step-{step:08}"), f"data.path={DATA}",
                "evaluation.metrics=[fid]", "evaluation.detector=classifier", f"evaluation.num_samples={SAMPLES}",
            )
        )  # fmt: skip
    return float(json.loads(kept.read_text())["fid[classifier]"])


def _rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _page(table: Sequence[tuple[str, int, str, list[float]]], curves: Sequence[Curve]) -> str:
    """Return a Markdown page."""
    rising = [curve.label for curve in curves if curve.y[-1] > 1.1 * min(curve.y)]
    helped = [name for name, _, _, (plain, augmented) in table if augmented < plain]
    lines = [
        "# A tenth of CIFAR-10, with and without augmentation",
        "",
        f"All FIDs are of {SAMPLES:,} samples against all 50,000 training images, also where training had 5,000,",
        "on features of a classifier trained on all. They compare with nothing published. `make results` writes this",
        f"page after `{PACK}`.",
        "",
        "![FID over training](limited-data.png)",
        "",
        "| FID[classifier] of DCGAN after thousands of images | " + " | ".join(f"{x:.0f}" for x in curves[0].x) + " |",
        "| --- |" + " ---: |" * len(curves[0].x),
        *(f"| {curve.label} | " + " | ".join(f"{y:.1f}" for y in curve.y) + " |" for curve in curves),
        "",
        f"FID rises again, by more than a tenth, with: {'; '.join(rising) or 'none of them, at this length'}.",
        *_verdict(rising),
        "",
        "Each run below had 5,000 images, and trained about five minutes on one core.",
        "",
        "| FID[classifier] | images seen | plain | augmented | augmentation |",
        "| --- | ---: | ---: | ---: | --- |",
        *(
            f"| {name} | {images:,} | " + " | ".join(f"{value:.1f}" for value in found) + f" | {augmentation} |"
            for name, images, augmentation, found in table
        ),
        "",
        f"Augmentation lowered FID with: {'; '.join(helped) or 'none of them, at this length'}.",
    ]
    return "\n".join(lines) + "\n"


def _verdict(rising: Sequence[str]) -> list[str]:
    """Say what the plot shows of the controller, if there was nothing that augmentation could delay."""
    (label, _, _), (_, augmented, _) = CURVES[1:]
    if label in rising:
        return []
    rows = _rows(RUNS / augmented)
    signs = [row["augmentation/sign"] for row in rows if "augmentation/sign" in row]
    return [
        "",
        "At this length the discriminator does not overfit to 5,000 images yet, so augmentation has nothing to delay",
        f"and slows training. The controller raises the probability to {rows[-1]['augmentation/probability']:.1f} all",
        f"the same, because the sign statistic is {signs[0]:.1f} at the start, above its target of 0.6.",
    ]
