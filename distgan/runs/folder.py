"""Run folder: how to find it, and how to move the files of an earlier training history aside."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from distgan.checkpoint import directory
from distgan.checkpoint.directory import Best, directory_name, steps, write_best
from distgan.checkpoint.downloads import is_url
from distgan.config import is_run_folder, parse_config
from distgan.config.fields import run_location
from distgan.config.yaml_text import read_recipe
from distgan.data.storage.locations import public_name
from distgan.errors import UserError

logger = logging.getLogger("distgan")

HISTORY = ("checkpoints", "averages", "metrics.jsonl", "tensorboard", "trackers", "samples")
"""Files of one training history; they are moved aside when a run starts at step 0."""


def run_folder_of(run_or_recipe: str, overrides: Iterable[str] = ()) -> Path | str:
    """Return the run folder from its path, or from the config and overrides of the run. Return a URL as it is.

    Raises:
        UserError: the path is empty or not a run folder, the config is wrong, or a folder comes with overrides.
    """
    if not run_or_recipe:
        raise UserError("RUN_OR_CONFIG: empty; expected a run folder or a config")
    overrides = list(overrides)
    if Path(run_or_recipe).is_file():
        # Code that the recipe names is not needed here, so it is not imported.
        config = parse_config(read_recipe(run_or_recipe), overrides, source=run_or_recipe)
        return config.run_url or config.run_folder
    if overrides:
        raise UserError(
            f"{public_name(run_or_recipe)}: overrides need a config, found a run folder; remove {overrides[0]}, or "
            "pass the config"
        )
    if is_url(run_or_recipe):
        try:
            return run_location(run_or_recipe)
        except ValueError as error:
            raise UserError(f"RUN_OR_CONFIG: {error}") from None
    folder = Path(run_or_recipe)
    if not is_run_folder(folder) and not (folder / "config.yaml").exists():
        raise UserError(
            f"{run_or_recipe}: not a run folder (no status.json in it); pass the run_dir of a run, or its config"
        )
    return folder


def moved_run(recipe: str | os.PathLike[str], run_dir: str | os.PathLike[str]) -> str | None:
    """Return a warning if a run's own config.yaml names another run_dir than the folder it is in, as after a move."""
    if is_url(os.fspath(run_dir)):  # its local folder has a copy of the config
        return None
    folder, name = os.path.split(os.fspath(recipe))
    here = folder or "."
    if name != "config.yaml" or not is_run_folder(Path(here)) or os.path.realpath(here) == os.path.realpath(run_dir):
        return None
    return (
        f"{recipe}: lies in the run folder {here}, but names run_dir = {run_dir}, which is used; to continue the run "
        f"in {here}: distgan train {shlex.quote(os.fspath(recipe))} {shlex.quote(f'run_dir={here}')}"
    )


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


def set_aside(folder: Path, what: str | None = None) -> None:
    """Move an earlier training history to `previous-N`. Nothing is deleted.

    Args:
        what: subject and verb of the message, if the run does not start at step 0.
    """
    found = [folder / name for name in HISTORY if (folder / name).exists()]
    if found:
        aside = _previous(folder)
        for path in found:
            path.rename(aside / path.name)
        logger.info("%s now in %s", what or f"starting at step 0; the earlier content of {folder} is", aside)


def set_aside_averages(folder: Path) -> None:
    """Move snapshots of averages to `previous-N` before a run starts at step 0 without a checkpoint."""
    if (folder / "averages").exists():
        aside = _previous(folder)
        (folder / "averages").rename(aside / "averages")
        logger.info("starting at step 0; the snapshots of an earlier attempt are now in %s", aside)


def set_aside_later(folder: Path, step: int, *, curves: bool = False) -> None:
    """Move the checkpoints after `step`, and copy metrics.jsonl, to `previous-N`, before the run continues.

    Args:
        curves: copy metrics.jsonl without later checkpoints too.
    """
    checkpoints = folder / "checkpoints"
    later = [number for number in steps(checkpoints) if number > step]
    if later or curves:
        aside = _previous(folder)
        (aside / "checkpoints").mkdir()
        for number in later:
            (checkpoints / directory_name(number)).rename(aside / "checkpoints" / directory_name(number))
        best = directory.read_best(checkpoints)
        if best is not None and best.step > step:
            (checkpoints / "best.json").rename(aside / "checkpoints" / "best.json")
        if (folder / "metrics.jsonl").exists():
            shutil.copy2(folder / "metrics.jsonl", aside)
        if (folder / "averages").exists():
            shutil.copytree(folder / "averages", aside / "averages")
        logger.info("going back to step %d; the later checkpoints and rows of %s are now in %s", step, folder, aside)


def _previous(folder: Path) -> Path:
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    aside.mkdir()
    return aside
