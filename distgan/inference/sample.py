"""Draw samples from a trained generator: images, lines of text, points, latents, or paths from one image to another."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distgan import interpolation
from distgan.data.kinds.text import decode_lines
from distgan.data.storage.locations import local_path
from distgan.errors import UserError, printable, within_memory
from distgan.files import write_atomically, write_lines, writing
from distgan.inference.export import load_generator
from distgan.inference.generation import from_network, picture_of
from distgan.inference.generator import Generator
from distgan.monitoring import pictures
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.stylegan2.noise import constant_noise

GRID_LIMIT = 4096
FILE_LIMIT = 10_000_000
"""Most lines or points per file."""
_ENDINGS = {"text": (".txt",), "points": (".png", ".npy"), "latents": (".png", ".npy")}
_ACCEPTED = {
    "images": "a file ending in .png, or a folder",
    "text": "a file ending in .txt",
    "points": "a file ending in .png or .npy",
    "latents": "a file ending in .png or .npy",
}


def sample(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    number: int = 64,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    best: bool = False,
    truncation: float | None = None,
) -> Path:
    """Draw `number` samples and write them; each is a function of the seed and its number.

    Args:
        out: for images a grid (.png) or a folder; for text a file of lines (.txt); for points and latents a picture
            (.png) or a NumPy array of shape (number, dimensions) or (number, C, R, R) (.npy).
        labels: classes by number or name, used in turn; None draws them with the class frequencies of the data.
        truncation: threshold of the latents, see `load_generator`.

    Raises:
        UserError: there is no generator, a class is unknown, the truncation does not fit, or `out` cannot be written.
    """
    target = _checked_target(out, number, batch_size, seed)
    generator, classes = _load(source, best, labels, truncation)
    _check_out(generator.shape.kind, target, number)
    batches = _batches(generator, number, seed, classes, batch_size)
    with writing(target), _memory(batch_size):
        _write(generator, target, batches, batch_size)
    return target


def _check_out(kind: str, target: Path, number: int) -> None:
    """Raise UserError if samples of this kind cannot be written to `target`."""
    ending = target.suffix.lower()
    if kind == "images":
        fits = ending == ".png" or ending not in {".txt", ".npy", *Image.registered_extensions()}
    else:
        fits = ending in _ENDINGS[kind]
    if not fits:
        raise UserError(f"--out {target}: this generator makes {kind}; pass {_ACCEPTED[kind]}")
    if kind in ("images", "latents") and ending == ".png" and number > GRID_LIMIT:
        raise UserError(f"--num {number}: a grid holds at most {GRID_LIMIT} images; pass a folder to --out")
    if kind == "images" and ending != ".png" and target.is_dir() and any(target.iterdir()):
        raise UserError(f"--out {target}: the folder is not empty; pass a new one, so that old samples stay apart")
    if kind != "images" and number > FILE_LIMIT:
        raise UserError(f"--num {number}: a file of {kind} holds at most {FILE_LIMIT}; lower --num")


def _write(generator: Generator, target: Path, batches: Iterator[Tensor], batch_size: int) -> None:
    """Write the batches to `target`. Raises OSError."""
    kind, ending = generator.shape.kind, target.suffix.lower()
    if kind == "images" and ending != ".png":
        target.mkdir(parents=True, exist_ok=True)
        for number, images in enumerate(batches):
            pictures.save_folder(target, images, start=number * batch_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    samples = torch.cat(list(batches))
    if kind == "text":
        assert generator.vocabulary is not None
        write_lines(target, decode_lines(samples.numpy(), generator.vocabulary))
    elif ending == ".npy":
        array = io.BytesIO()
        np.save(array, samples.numpy(), allow_pickle=False)
        write_atomically(target, array.getvalue(), durable=False)
    else:
        pictures.save_png(target, picture_of(generator.shape, samples))


@torch.no_grad()
def sample_paths(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    steps: int,
    number: int = 8,
    linear: bool = False,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    best: bool = False,
    truncation: float | None = None,
) -> Path:
    """Draw `number` paths of `steps` images, path i from the latent of image 2 i of `sample` to that of 2 i + 1.

    A .png has one path per row. A .gif or .webp animates all paths side by side, forward and back.

    Args:
        linear: use straight lines between the latents instead of arcs.
        labels: classes of the paths, used in turn; None uses the class of the path's first image.
        truncation: threshold of the latents between which the paths are, see `load_generator`.

    Raises:
        UserError: as for `sample`.
    """
    target = _checked_target(out, number, batch_size, seed)
    kind = target.suffix.lower()
    if kind not in (".png", ".gif", ".webp"):
        raise UserError(f"--out {out}: with --interpolate, pass a file ending in .png, .gif or .webp")
    if steps < 2 or number * steps > GRID_LIMIT:
        raise UserError(
            f"--interpolate {steps} --num {number}: expected at least 2 steps, and at most {GRID_LIMIT} images in all"
        )
    generator, classes = _load(source, best, labels, truncation)
    if generator.shape.kind != "images":
        raise UserError(
            f"--interpolate {steps}: needs a generator of images, found one of {generator.shape.kind}; "
            "remove --interpolate"
        )
    latents, drawn = generator.inputs(2 * number, seed=seed)
    if classes is not None:
        drawn = classes[torch.arange(2 * number) // 2 % len(classes)].to(latents.device)
    path = interpolation.lerp if linear else interpolation.slerp
    latents, drawn = interpolation.latent_paths(latents, drawn, steps, path)
    places = torch.arange(len(latents)).split(batch_size)
    with reference_moments(generator.network), constant_noise(generator.network), _memory(batch_size):
        images = torch.cat(
            [
                from_network(generator.shape, generator(latents[at], drawn[at] if drawn is not None else None)).cpu()
                for at in places
            ]
        )
    with writing(target):
        if kind == ".png":
            pictures.save_png(target, pictures.grid(images, columns=steps))
        else:
            frames = [pictures.grid(images[step::steps]) for step in (*range(steps), *range(steps - 2, 0, -1))]
            pictures.save_animation(target, torch.stack(frames))
    return target


def _memory(batch_size: int) -> AbstractContextManager[None]:
    """Turn a lack of memory inside into a UserError that names --batch-size."""
    return within_memory(f"--batch-size {batch_size}", "lower it")


def _checked_target(out: str | os.PathLike[str], number: int, batch_size: int, seed: int) -> Path:
    if not os.fspath(out):
        raise UserError("--out is empty; pass a file ending in .png, .txt or .npy, or a folder")
    if not (1 <= number <= 2**40 and 1 <= batch_size <= 2**17):
        raise UserError(
            f"--num {number} --batch-size {batch_size}: expected at least 1, and at most 2**40 samples, 2**17 at a time"
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a number from 0 to 2**63 - 1")
    return local_path(out, "--out")


def _load(
    source: str | os.PathLike[str], best: bool, labels: Sequence[str] | None, truncation: float | None
) -> tuple[Generator, Tensor | None]:
    """Load the generator on the GPU, or on the CPU without one; return it and the numbers of the requested classes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = load_generator(source, best=best, device=device, truncation=truncation)
    generator.check_draws()
    classes = None if labels is None else torch.tensor([_class_number(generator, label) for label in labels])
    return generator, classes


@torch.no_grad()
def _batches(generator: Generator, number: int, seed: int, classes: Tensor | None, batch_size: int) -> Iterator[Tensor]:
    with reference_moments(generator.network):
        for first in range(0, number, batch_size):
            count = min(batch_size, number - first)
            latents, labels = generator.inputs(count, seed=seed, first=first)
            if classes is not None:
                labels = classes[torch.arange(first, first + count) % len(classes)].to(latents.device)
            yield from_network(generator.shape, generator(latents, labels)).cpu()


def _class_number(generator: Generator, label: str) -> int:
    names = generator.class_names or []
    if not generator.num_classes:
        raise UserError(f"--labels {label}: this generator is unconditional; remove --labels")
    if label in names:
        return names.index(label)
    if label.isdecimal() and len(label) <= 18 and int(label) < generator.num_classes:
        return int(label)
    known = printable(f" or one of {', '.join(names[:20])}") if names else ""
    raise UserError(f"--labels {printable(label[:80])}: expected a number from 0 to {generator.num_classes - 1}{known}")
