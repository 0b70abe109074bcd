"""Train every recipe with the same budget, and write a table and one picture per recipe to docs/results/.

Run it with `make results`. The tool skips finished recipes and resumes interrupted ones. All steps use the command
line: pack, train, stop, evaluate, sample. To repeat a recipe, delete its folder in runs/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import latents  # noqa: E402
from tools.commands import distgan, later_wins, launched  # noqa: E402
from tools.experiments import limited_data, stacked_mnist  # noqa: E402

RUNS, OUT = ROOT / "runs" / "results", ROOT / "docs" / "results"
SIZED_FOR_A_CPU = ("digits-*", "*-small")
PACKING: dict[str, list[str]] = {
    "datasets/digits": ["builtin:digits", "--resolution", "32", "--shard-size", "300"],
    "datasets/python": ["builtin:text", "--held-out", "0.1"],
}
"""Data folder -> arguments of `distgan pack`. Recipes on other data are skipped if the data are missing."""
PAGES = {"limited-data.md": "a tenth of CIFAR-10", "stacked-mnist.md": "StackedMNIST"}
"""Pages of the experiments, and their titles."""
METRICS = {"images": "[fid,inception_score,classes]", "latents": "[fid,inception_score,classes]",
           "text": "[ngram_js]"}  # fmt: skip
COLUMNS = {
    "FID[classifier]": "fid[classifier]",
    "IS[classifier]": "inception_score[classifier]",
    "classes[classifier]": "classes[classifier]",
    "smallest class": "classes_smallest_share[classifier]",
    "4-gram JS (bits)": "ngram_js[4]",
    "its baseline": "ngram_js_baseline[4]",
    "samples/s": "speed",
    "steps": "steps",
}


@dataclass(frozen=True)
class Recipe:
    """Recipe file in configs/."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def values(self) -> dict[str, Any]:
        return dict(yaml.safe_load(self.path.read_text()))

    @property
    def kind(self) -> str:
        return str(self.values["data"].get("kind", "images"))

    @property
    def length(self) -> str:
        """Training steps of the whole recipe."""
        training = self.values["training"]
        return f"{training['steps']:,}" if "steps" in training else f"{training['kimg']} kimg"

    @property
    def reconstructs(self) -> bool:
        """Whether it trains an autoencoder, which makes data of other recipes and draws nothing."""
        return "reconstruction" in self.values.get("objective", {})

    @property
    def run(self) -> Path:
        return RUNS / self.name

    @property
    def result(self) -> Path:
        """File in the run folder that stores the measured values."""
        return self.run / "result.json"


def main() -> None:
    options = parse()
    budget = f"{options.steps} steps" if options.steps else f"{options.minutes:g} minutes"
    budget += f" of {options.processes} process{'es' * (options.processes > 1)}"
    names = options.recipes or SIZED_FOR_A_CPU
    recipes = [Recipe(path) for name in names for path in sorted((ROOT / "configs").glob(f"{name}.yaml"))]
    recipes = [recipe for recipe in recipes if not recipe.reconstructs]
    done = []
    for recipe in recipes:
        if not is_packed(recipe):
            print(f"{recipe.name}: skipped: {recipe.values['data']['path']} does not exist; pack it first")
            continue
        done.append(recipe)
        if not recipe.result.exists() or json.loads(recipe.result.read_text())["budget"] != budget:
            print(f"{recipe.name}: {budget}", flush=True)
            train(recipe, options)
            recipe.result.write_text(json.dumps({"budget": budget} | measure(recipe, options.overrides), indent=1))
        picture(recipe)
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "README.md").write_text(table(done, budget))
    gallery(done)
    for experiment in () if options.recipes else (limited_data, stacked_mnist):
        if (ROOT / experiment.DATA).exists():
            experiment.main(OUT)
        else:
            print(f"{experiment.DATA}: does not exist; pack it first: {experiment.PACK}")
    print(f"\n{OUT / 'README.md'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="file names in configs/ (default: CPU recipes)")
    parser.add_argument("--minutes", type=float, default=6.0, help="training minutes per recipe (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes per recipe (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps per recipe, instead of minutes")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="key=value", help="override for all recipes"
    )
    return parser.parse_args()


def is_packed(recipe: Recipe) -> bool:
    """Make the data of a recipe if they are known: latents, or what PACKING lists. Return True if the data exist."""
    path = str(recipe.values["data"]["path"])
    if path == latents.LATENTS:
        latents.make_data()
    if path in PACKING and not (ROOT / path / "index.safetensors").exists():
        distgan("pack", PACKING[path][0], path, *PACKING[path][1:])
    return (ROOT / path).exists()


def train(recipe: Recipe, options: argparse.Namespace) -> None:
    """Train for `options.steps` steps, or for `options.minutes` minutes and then `distgan stop`.

    Raises:
        SystemExit: the training failed; carries its exit status.
    """
    steps = [f"training.steps={options.steps}"] if options.steps else []
    overrides = later_wins("evaluation.every=0", *options.overrides, *steps, f"run_dir={recipe.run}")
    started, metrics = time.time(), recipe.run / "metrics.jsonl"
    job = subprocess.Popen(launched(options.processes, "train", str(recipe.path), *overrides), cwd=ROOT)
    begun = None  # time of the first metrics row, so that the startup does not count
    while job.poll() is None:
        time.sleep(0.5)
        if begun is None and metrics.exists() and metrics.stat().st_mtime > started:
            begun = time.monotonic()
        if not options.steps and begun is not None and time.monotonic() - begun > 60 * options.minutes:
            # Do not check the exit status, because the run may have finished just now.
            subprocess.run([sys.executable, "-m", "distgan", "stop", str(recipe.run)], cwd=ROOT, check=False)
            job.wait()
    if job.returncode:
        raise SystemExit(job.returncode)


def measure(recipe: Recipe, overrides: list[str]) -> dict[str, Any]:
    """Return the metrics of the trained generator, the median training speed in samples/s and the number of steps."""
    said = distgan("evaluate", str(recipe.run), *later_wins(f"evaluation.metrics={METRICS[recipe.kind]}", *overrides))
    rows = [json.loads(line) for line in (recipe.run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["speed/images_per_second"] for row in rows if "speed/images_per_second" in row]
    speed = {"speed": statistics.median(speeds)} if speeds else {}
    metrics: dict[str, Any] = json.loads(said)
    return {"steps": metrics.pop("step")} | metrics | speed


def picture(recipe: Recipe) -> None:
    """Draw samples of the newest checkpoint: a grid of images, or a picture of text lines."""
    target = OUT / f"{recipe.name}.png"
    if target.exists() and target.stat().st_mtime > recipe.result.stat().st_mtime:
        return
    if recipe.kind != "text":
        distgan("sample", str(recipe.run), "--num", "64", "--out", str(target))
        return
    lines = recipe.run / "samples.txt"
    distgan("sample", str(recipe.run), "--num", "24", "--out", str(lines))
    font = ImageFont.load_default(16)
    page = Image.new("L", (420, 24 * 22 + 16), 255)
    ImageDraw.Draw(page).multiline_text((12, 8), lines.read_text(), fill=0, font=font, spacing=6)
    OUT.mkdir(parents=True, exist_ok=True)
    page.save(target, optimize=True)


def gallery(recipes: list[Recipe]) -> None:
    """Draw the upper left corners of all pictures on one page."""
    side, columns, title = 200, 4, 22
    page = Image.new("RGB", (columns * (side + 8), -(-len(recipes) // columns) * (side + title + 8)), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for number, recipe in enumerate(recipes):
        left, upper = number % columns * (side + 8), number // columns * (side + title + 8)
        canvas.text((left + side / 2, upper + 4), recipe.name, fill="black", font=font, anchor="mt")
        with Image.open(OUT / f"{recipe.name}.png") as picture:
            page.paste(picture.convert("RGB").crop((0, 0, side, side)), (left, upper + title))
    page.save(OUT / "gallery.png", optimize=True)


def table(recipes: list[Recipe], budget: str) -> str:
    """Return a Markdown page with a table of the values, and the pictures."""
    results = {recipe.name: json.loads(recipe.result.read_text()) for recipe in recipes}
    lines = [
        "# Every recipe, the same budget",
        "",
        f"Each recipe trained for at most {budget}. `make results` writes this page. FID, IS and classes use",
        "a classifier trained on the same data. They compare only between rows on the same data, and with nothing",
        "published. Recipes that take longer were stopped early, within the curves of their schedules too: the last",
        "column has the steps of the whole recipe.",
        "",
        "- classes[classifier]: classes with at least a tenth of their share in the data among the samples.",
        "- Smallest class: share of the rarest class among the samples.",
        "- Samples/s: training speed, which depends on the machine and its load.",
        "",
        *(f"- More: [{title}]({name})" for name, title in PAGES.items() if (OUT / name).exists()),
        "",
        "| recipe | " + " | ".join(COLUMNS) + " | of |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 1),
    ]
    lengths = {recipe.name: recipe.length for recipe in recipes}
    for name, values in results.items():
        cells = [*(shown(values.get(key)) for key in COLUMNS.values()), lengths[name]]
        lines.append(f"| [{name}](../../configs/{name}.yaml) | " + " | ".join(cells) + " |")
    for name in results:
        lines += ["", f"## {name}", "", f"![samples of {name}]({name}.png)"]
        if name == latents.GENERATOR:
            lines += [
                "",
                f"On the latents of [{latents.AUTOENCODER}](../../configs/{latents.AUTOENCODER}.yaml). `make latents` "
                "trains both:",
                "",
                f"![real digits, reconstructions and samples]({latents.PICTURE.name})",
            ]
    return "\n".join(lines) + "\n"


def shown(value: float | None) -> str:
    """Format a value with three significant digits, or as an integer from 100 on; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    main()
