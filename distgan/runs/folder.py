"""What belongs to one course of training in a run folder, and how it is set aside for another."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from distgan.checkpoint import directory
from distgan.checkpoint.directory import Best, directory_name, steps, write_best

logger = logging.getLogger("distgan")

HISTORY = ("checkpoints", "metrics.jsonl", "tensorboard", "samples")
"""What belongs to one course of training, and is set aside when a run starts over."""


def mark_own_best(folder: Path, path: Path, best: Best) -> None:
    """Mark a checkpoint of this run as its best. It was to be marked once it was written: a kill may have come between.

    Raises:
        OSError: the folder cannot be written to.
    """
    if is_own(folder, path):
        write_best(path.parent, best)


def is_own(folder: Path, path: Path) -> bool:
    """Whether a checkpoint is of the course of training that a run folder is at."""
    return path.resolve().parent == (folder / "checkpoints").resolve()


def set_aside(folder: Path) -> None:
    """Move an earlier course of training into `previous-N`; nothing is deleted."""
    found = [folder / name for name in HISTORY if (folder / name).exists()]
    if found:
        aside = _previous(folder)
        for path in found:
            path.rename(aside / path.name)
        logger.info("starting over; what was in %s is now in %s", folder, aside)


def set_aside_later(folder: Path, step: int) -> None:
    """Move the checkpoints after `step`, with a copy of the curves, into `previous-N`: the run goes on from there."""
    checkpoints = folder / "checkpoints"
    later = [number for number in steps(checkpoints) if number > step]
    if later:
        aside = _previous(folder)
        (aside / "checkpoints").mkdir()
        for number in later:
            (checkpoints / directory_name(number)).rename(aside / "checkpoints" / directory_name(number))
        best = directory.read_best(checkpoints)
        if best is not None and best.step > step:
            (checkpoints / "best.json").rename(aside / "checkpoints" / "best.json")
        if (folder / "metrics.jsonl").exists():
            shutil.copy2(folder / "metrics.jsonl", aside)
        logger.info("going back to step %d; the later checkpoints of %s are now in %s", step, folder, aside)


def _previous(folder: Path) -> Path:
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    aside.mkdir()
    return aside
