"""Files of one training history in a run folder, and how to move them aside for a new one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from distgan.checkpoint import directory
from distgan.checkpoint.directory import Best, directory_name, steps, write_best

logger = logging.getLogger("distgan")

HISTORY = ("checkpoints", "metrics.jsonl", "tensorboard", "samples")
"""Files of one training history; they are moved aside when a run starts at step 0."""


def mark_own_best(folder: Path, path: Path, best: Best) -> None:
    """Mark a checkpoint of this run as its best. A kill can come between writing and marking it.

    Raises:
        OSError: the folder is not writable.
    """
    if is_own(folder, path):
        write_best(path.parent, best)


def is_own(folder: Path, path: Path) -> bool:
    """Return True if a checkpoint lies in the checkpoints folder of this run."""
    return path.resolve().parent == (folder / "checkpoints").resolve()


def set_aside(folder: Path) -> None:
    """Move an earlier training history to `previous-N`. Nothing is deleted."""
    found = [folder / name for name in HISTORY if (folder / name).exists()]
    if found:
        aside = _previous(folder)
        for path in found:
            path.rename(aside / path.name)
        logger.info("starting at step 0; the earlier content of %s is now in %s", folder, aside)


def set_aside_later(folder: Path, step: int) -> None:
    """Move the checkpoints after `step`, and copy metrics.jsonl, to `previous-N`, before the run continues."""
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
