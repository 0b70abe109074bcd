"""Snapshots of power-function averages in a run folder: `averages/snapshot-IMAGES.safetensors`, STD/PARAMETER each."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from distgan.files import reason, write_atomically

logger = logging.getLogger("distgan")

FOLDER = "averages"
"""Folder of the snapshots in a run folder."""
_NAME = re.compile(r"snapshot-(\d{12})\.safetensors")


def snapshots(run: Path) -> dict[int, Path]:
    """Return images seen -> file for the snapshots of a run, in order."""
    found = ((_NAME.fullmatch(path.name), path) for path in sorted((run / FOLDER).glob("snapshot-*.safetensors")))
    return {int(match[1]): path for match, path in found if match}


def write_snapshot(run: Path, images: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the averages at `images` atomically. Log a disk error and go on, as for checkpoints."""
    try:
        (run / FOLDER).mkdir(exist_ok=True)
        content = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        write_atomically(run / FOLDER / f"snapshot-{images:012d}.safetensors", content)
    except OSError as error:
        logger.error("the averages at %d images cannot be saved: %s; training goes on", images, reason(error))


def remove_later_snapshots(run: Path, images: int) -> None:
    """Remove the snapshots after `images`: a resumed run trains those steps again. Raises OSError."""
    for later, path in snapshots(run).items():
        if later > images:
            path.unlink()
            logger.info("removed %s: the run continues from %d images", path, images)
