"""The whole chain of a GAN on latents: pack digits, train an autoencoder, encode, train a GAT, decode and evaluate.

Run it with `make latents`. It writes a picture of reals, reconstructions and samples to docs/results/. A second run
resumes unfinished training and repeats the quick steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.commands import distgan, launched, processes  # noqa: E402

IMAGES, LATENTS = "datasets/digits", "datasets/digits-latents"
AUTOENCODER, GENERATOR = "digits-autoencoder", "digits-gat-small"
PICTURE = ROOT / "docs" / "results" / "digits-latents.png"
SIDE = 6
"""Images per row and per column of each part of the picture."""


def main() -> None:
    options = parse()
    started = time.monotonic()
    make_data(options.processes, options.overrides)
    train(GENERATOR, options.processes, options.overrides)
    for name in (AUTOENCODER, GENERATOR):
        print(f"{name}: {distgan('evaluate', f'runs/{name}').strip()}", flush=True)
    draw(options.out)
    print(f"{options.out} ({time.monotonic() - started:.0f} s)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=processes(), help="processes (default: one per GPU, or two)")
    parser.add_argument("--out", type=Path, default=PICTURE, help="picture to write (default: %(default)s)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="key=value", help="override for both recipes"
    )
    return parser.parse_args()


def make_data(count: int = 1, overrides: list[str] | None = None) -> None:
    """Pack the images, train the autoencoder and encode, as far as it is not done.

    Raises:
        SystemExit: a command failed.
    """
    if not (ROOT / IMAGES / "index.safetensors").exists():
        distgan("pack", "builtin:digits", IMAGES, "--resolution", "32", "--shard-size", "300")
    if not (ROOT / LATENTS / "index.safetensors").exists():
        train(AUTOENCODER, count, overrides or [])
        run = f"runs/{AUTOENCODER}"
        distgan("encode", IMAGES, LATENTS, "--encoder", run, "--resolution", "32", "--channels", "1")


def train(name: str, count: int, overrides: list[str]) -> None:
    """Train a recipe of configs/ to its end. Raises SystemExit if it fails."""
    command = launched(count, "train", f"configs/{name}.yaml", *overrides)
    if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(status)


@torch.no_grad()
def draw(out: Path) -> None:
    """Draw real digits, their reconstructions, and decoded samples."""
    from distgan import load_config, load_generator
    from distgan.data.index.loading import load_index
    from distgan.data.reader import read_samples
    from distgan.inference.generation import from_bytes, to_bytes
    from distgan.monitoring.pictures import grid

    config = load_config(ROOT / "configs" / f"{AUTOENCODER}.yaml")
    numbers = range(SIDE**2)
    reals = read_samples(config.data, load_index(str(ROOT / IMAGES)), numbers).data
    made = load_generator(ROOT / "runs" / AUTOENCODER)(from_bytes(reals))
    generator = load_generator(ROOT / "runs" / GENERATOR)
    drawn = generator(*generator.inputs(SIDE**2))
    parts = {"real digits": reals, "reconstructions": to_bytes(made), "samples": to_bytes(drawn)}
    sheets = {name: Image.fromarray(grid(images)[0].numpy()) for name, images in parts.items()}
    width, title, gap = sheets["samples"].width, 22, 12
    page = Image.new("L", (len(sheets) * (width + gap) - gap, width + title), 255)
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for number, (name, sheet) in enumerate(sheets.items()):
        left = number * (width + gap)
        canvas.text((left + width / 2, 4), name, fill=0, font=font, anchor="mt")
        page.paste(sheet, (left, title))
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out, optimize=True)


if __name__ == "__main__":
    main()
