"""Draw what each transform of `objective.augmentation` does to a test card, for docs/augmentation.md.

Each row has the card, then seven samples with one transform at probability 1, drawn as in training.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distgan import randomness
from distgan.config.objective.augmentation import AUGMENTATIONS
from distgan.losses.augmentation import Augmentation, AugmentationDraws
from distgan.losses.augmentation.ada import Ada
from distgan.losses.augmentation.diffaugment import DiffAugment

FOLDER = Path(__file__).parent.parent / "docs" / "augmentation"
SIDE, SAMPLES, GAP = 64, 7, 4
"""Pixels of the card, samples per row, and pixels between cells."""
LABEL = 168
"""Width of the column of names in pixels."""

Row = tuple[str, Augmentation, float]
"""Label, augmentation and probability."""


def card() -> Tensor:
    """Return the test card, (3, 64, 64) in [-1, 1]: color bars, a disc, stripes, a gradient and a letter."""
    scale = 4
    image = Image.new("RGB", (SIDE * scale, SIDE * scale))
    canvas = ImageDraw.Draw(image)
    for row in range(SIDE * scale):
        shade = 50 + row * 120 // (SIDE * scale)
        canvas.line([(0, row), (SIDE * scale, row)], fill=(shade, shade, shade + 30))
    bars = ("#d94f3d", "#e8b23a", "#4faf5a", "#3f8fd2", "#8d5fb8", "#e6e6e6")
    for number, color in enumerate(bars):
        left = number * SIDE * scale / len(bars)
        canvas.rectangle([left, 0, left + SIDE * scale / len(bars), 14 * scale], fill=color)
    canvas.ellipse([8 * scale, 22 * scale, 32 * scale, 46 * scale], fill="#f2d06b", outline="#5a3d1e", width=scale)
    for number in range(6):
        left = (38 + 4 * number) * scale
        canvas.rectangle([left, 48 * scale, left + 2 * scale - 1, 58 * scale], fill="#f5f5f5")
    canvas.text((40 * scale, 16 * scale), "R", fill="#20242c", font=ImageFont.load_default(size=30 * scale))
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def rows() -> dict[str, list[Row]]:
    """Return file name -> rows."""
    names = list(AUGMENTATIONS["ada"].options.model_fields)
    ada: list[Row] = [(name, Ada(**{other: float(other == name) for other in names}), 1.0) for name in names]
    ada += [(f"all defaults, {probability:g}", Ada(), probability) for probability in (0.3, 0.8)]
    policies = (("color",), ("translation",), ("cutout",), ("color", "translation", "cutout"))
    return {"ada": ada, "diffaugment": [(", ".join(policy), DiffAugment(policy), 1.0) for policy in policies]}


def sheet(entries: list[Row]) -> Image.Image:
    """Draw one row per entry."""
    step = SIDE + GAP
    picture = Image.new("RGB", (LABEL + (SAMPLES + 1) * step, len(entries) * step + GAP), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    original = card()
    for row, (label, augmentation, probability) in enumerate(entries):
        top = GAP + row * step
        canvas.text((6, top + SIDE / 2), label, fill="black", font=font, anchor="lm")
        augmented = augmentation(original.expand(SAMPLES, -1, -1, -1), draws(probability))
        for column, image in enumerate((original, *augmented)):
            pixels = ((image + 1.0) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
            picture.paste(Image.fromarray(pixels.numpy()), (LABEL + column * step, top))
    return picture


def draws(probability: float) -> AugmentationDraws:
    """Return the draws of the samples of a row, the same in each row."""
    places = torch.arange(SAMPLES)
    return AugmentationDraws(
        uniform=lambda purpose, *shape: randomness.uniform(2, purpose, places, shape),
        normal=lambda purpose, *shape: randomness.normal(2, purpose, places, shape),
        probability=probability,
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, entries in rows().items():
        path = FOLDER / f"{name}.png"
        sheet(entries).save(path, optimize=True)
        print(f"{path}: {len(entries)} rows, {math.ceil(path.stat().st_size / 1000)} kB")


if __name__ == "__main__":
    main()
