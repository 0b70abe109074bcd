"""Images from a trained generator, as a grid or as a folder of PNGs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distgan.data.index_table import plain
from distgan.errors import UserError
from distgan.export import Generator, load_generator
from distgan.generation import from_network
from distgan.monitoring import pictures

GRID_LIMIT = 4096


def sample(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    number: int = 64,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    best: bool = False,
) -> Path:
    """Draw `number` images, each a function of (seed, its number), into a grid (`out` ends in .png) or a folder.

    Args:
        labels: classes by number or name, repeated in turn; None draws them as frequent as in the data.

    Raises:
        UserError: nothing to load, unknown classes, or `out` cannot be written.
    """
    if not os.fspath(out):
        raise UserError("--out is empty; name a file ending in .png, or a folder")
    target = Path(out)
    if not (1 <= number <= 2**40 and 1 <= batch_size <= 2**24):
        raise UserError(
            f"--num {number} --batch-size {batch_size}: expected at least 1, and at most 2**40 images, 2**24 at a time"
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a number from 0 to 2**63 - 1")
    as_grid = target.suffix.lower() == ".png"
    if as_grid and number > GRID_LIMIT:
        raise UserError(f"--num {number}: a grid holds at most {GRID_LIMIT} images; name a folder in --out")
    generator = load_generator(source, best=best)
    generator.to("cuda" if torch.cuda.is_available() else "cpu")
    classes = None if labels is None else torch.tensor([_class_number(generator, label) for label in labels])
    batches = _batches(generator, number, seed, classes, batch_size)
    try:
        if as_grid:
            target.parent.mkdir(parents=True, exist_ok=True)
            pictures.save_png(target, pictures.grid(torch.cat(list(batches))))
        else:
            target.mkdir(parents=True, exist_ok=True)
            for start, images in zip(range(0, number, batch_size), batches, strict=True):
                pictures.save_folder(target, images, start=start)
    except OSError as error:
        raise UserError(f"{target}: cannot write there: {error.strerror or error}") from None
    return target


@torch.no_grad()
def _batches(generator: Generator, number: int, seed: int, classes: Tensor | None, batch_size: int) -> Iterator[Tensor]:
    for first in range(0, number, batch_size):
        count = min(batch_size, number - first)
        latents, labels = generator.inputs(count, seed=seed, first=first)
        if classes is not None:
            labels = classes[torch.arange(first, first + count) % len(classes)].to(latents.device)
        yield from_network(generator.shape, generator(latents, labels)).cpu()


def _class_number(generator: Generator, label: str) -> int:
    names = generator.class_names or []
    if not generator.num_classes:
        raise UserError(f"--labels {label}: this generator is unconditional; leave --labels out")
    if label in names:
        return names.index(label)
    if label.isdecimal() and len(label) <= 18 and int(label) < generator.num_classes:
        return int(label)
    known = plain(f" or one of {', '.join(names[:20])}") if names else ""
    raise UserError(f"--labels {plain(label[:80])}: expected a number from 0 to {generator.num_classes - 1}{known}")
