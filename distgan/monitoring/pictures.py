"""Pictures of samples: a grid, or one PNG each."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distgan.files import write_atomically

GAP = 2
"""Black pixels between the images of a grid."""


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images in rows, left to right, with black gaps between them and in what the last row lacks.

    Args:
        images: uint8, (n, C, H, W) with n > 0.
        columns: images in a row; by default as many as make the number of rows and columns nearly equal.

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
    """Write a PNG, whole or not at all, making its folder.

    Args:
        image: uint8, (3, H, W) or (1, H, W).

    Raises:
        OSError: it cannot be written there.
    """
    assert image.dtype == torch.uint8
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels)
    encoded = io.BytesIO()
    picture.save(encoded, format="png")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encoded.getvalue(), durable=False)


def save_folder(folder: str | Path, images: Tensor, *, start: int = 0) -> None:
    """Write each image as a PNG named by its number: `000000.png`, counted from `start`.

    Args:
        images: uint8, (n, C, H, W) with C 1 or 3.

    Raises:
        OSError: one cannot be written there.
    """
    for number, image in enumerate(images.cpu(), start):
        save_png(Path(folder) / f"{number:06d}.png", image)
