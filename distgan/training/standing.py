"""How a run stands, in a line that scripts can read: what a job script decides by whether to queue itself again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from distgan.config import load_config
from distgan.errors import UserError
from distgan.training.checkpoint_folder import latest_step
from distgan.training.preemption import read_status


class Standing(NamedTuple):
    """The outcome of a run's last attempt."""

    outcome: str
    """`none` before the first start, then what status.json says, but `lost` for a failure for want of a rank only."""
    checkpoint: int
    """Step of the newest checkpoint; -1 if there is none."""
    reason: str

    def __str__(self) -> str:
        return f"{self.outcome} {self.checkpoint} {self.reason}".rstrip()


def standing(run_dir: str | Path) -> Standing:
    """How the run of a folder stands. Raises UserError if its status.json is damaged."""
    status = read_status(run_dir)
    step = latest_step(Path(run_dir) / "checkpoints")
    checkpoint = -1 if step is None else step
    if status is None:
        return Standing("none", checkpoint, "")
    return Standing("lost" if status.lost_rank else status.outcome, checkpoint, status.reason or "")


def run_folder_of(run_or_recipe: str, overrides: Iterable[str] = ()) -> Path:
    """The run folder that is meant: by its path, or by the recipe (and overrides) that the run was started with.

    Raises:
        UserError: the path is empty or of no run, the recipe is wrong, or overrides are given to a folder.
    """
    if not run_or_recipe:
        raise UserError("RUN_OR_CONFIG is empty; name a run folder or a recipe")
    overrides = list(overrides)
    if Path(run_or_recipe).is_file():
        return Path(load_config(run_or_recipe, overrides).run_dir)
    if overrides:
        raise UserError(
            f"{run_or_recipe}: no recipe, so {overrides[0]} means nothing; give the recipe, or only the folder"
        )
    folder = Path(run_or_recipe)
    if not any((folder / name).exists() for name in ("status.json", "config.yaml", "checkpoints")):
        raise UserError(
            f"{run_or_recipe}: not a run folder (it would hold status.json); give the run_dir of a run, or its recipe"
        )
    return folder
