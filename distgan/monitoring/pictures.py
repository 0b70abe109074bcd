"""Pictures of samples: a grid, one PNG each, or an animation."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distgan.files import disk_errors, write_atomically

GAP = 2
"""Black pixels between the images of a grid."""


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Arrange images in rows, left to right, with black gaps between them and black unused cells.

    Args:
        images: uint8, (n, C, H, W) with n > 0.
        columns: images per row; by default chosen for a nearly square grid.

    Returns:
        uint8, (C, rows * (H + GAP) - GAP, columns * (W + GAP) - GAP), on the CPU.
    """
    assert images.dtype == torch.uint8
    number, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(number)), number)
    rows = -(-number // columns)
    cells = torch.zeros(rows * columns, channels, height + GAP, width + GAP, dtype=torch.uint8)
    cells[:number, :, :height, :width] = images.cpu()
    sheet = cells.view(rows, columns, channels, height + GAP, width + GAP).permute(2, 0, 3, 1, 4)
    return sheet.reshape(channels, rows * (height + GAP), columns * (width + GAP))[:, :-GAP, :-GAP].contiguous()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write a PNG atomically; create its folder.

    Args:
        image: uint8, (3, H, W) or (1, H, W).

    Raises:
        OSError: it cannot be written there.
    """
    encoded = io.BytesIO()
    _picture(image).save(encoded, format="png")
    _write(Path(path), encoded.getvalue())


def save_animation(path: str | Path, frames: Tensor, *, milliseconds: int = 80) -> None:
    """Write an endless GIF or animated WebP, by the path's suffix, atomically.

    Args:
        frames: uint8, (n, 3, H, W) or (n, 1, H, W); a GIF has at most 256 colors per frame.
        milliseconds: duration of each frame.

    Raises:
        OSError: it cannot be written there.
    """
    first, *others = map(_picture, frames)
    encoded = io.BytesIO()
    kind = Path(path).suffix[1:].lower()
    options = {"lossless": True} if kind == "webp" else {}
    first.save(encoded, kind, save_all=True, append_images=others, duration=milliseconds, loop=0, **options)
    _write(Path(path), encoded.getvalue())


def save_folder(folder: str | Path, images: Tensor, *, start: int = 0) -> None:
    """Write each image as a PNG named by its number: `000000.png`, counted from `start`.

    Args:
        images: uint8, (n, C, H, W) with C 1 or 3.

    Raises:
        OSError: one cannot be written there.
    """
    for number, image in enumerate(images.cpu(), start):
        save_png(Path(folder) / f"{number:06d}.png", image)


def _picture(image: Tensor) -> Image.Image:
    assert image.dtype == torch.uint8
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels)


def _write(path: Path, content: bytes) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content, durable=False)
