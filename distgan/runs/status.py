"""How a run stands, in its `status.json`: launchers turn every exit code into 1, so a run says itself how it ended.

Job scripts read it as one line, by which they decide whether to queue themselves again.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from distgan.checkpoint.directory import latest_step
from distgan.config import load_config
from distgan.errors import UserError
from distgan.files import explained, read_bounded, try_lock, write_atomically

logger = logging.getLogger("distgan")

_REASON_LIMIT = 2000
_STATUS_LIMIT = 64 << 10

Outcome = Literal["running", "finished", "preempted", "failed"]


class Status(BaseModel):
    """The content of status.json."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    reason: str | None = None
    """Why it failed, was preempted or finished early, in one line."""
    lost_rank: bool = False
    """Whether it failed for want of another rank only, which a restart mends."""
    step: int | None = None
    world_size: int | None = None
    restarts: int = 0
    """Attempts before this one in the same run folder."""
    launch: str | None = None
    """The launch that the attempt belongs to, by the name that torchrun has for it (`--rdzv-id`)."""
    time: str
    """When this was written: ISO 8601, UTC."""
    host: str
    pid: int


def write_status(
    run_dir: str | Path,
    outcome: Outcome,
    *,
    step: int | None = None,
    reason: str | None = None,
    world_size: int | None = None,
    lost_rank: bool = False,
) -> bool:
    """Say how the run stands. `running` begins an attempt; the first other outcome of an attempt is its last.

    So neither the failures that follow from a rank's failure nor a later preemption take its place, whichever rank
    or node they come from.

    Returns:
        Whether it was written. A disk error is logged, except for `running`.

    Raises:
        OSError: the folder cannot be written to when an attempt begins.
    """
    file = Path(run_dir) / "status.json"
    try:
        with _exclusive(run_dir):
            before = _previous_status(run_dir)
            if outcome == "running":
                restarts = before.restarts + 1 if before else 0
            elif before and before.outcome != "running":
                return False
            else:
                restarts = before.restarts if before else 0
                step = step if step is not None or before is None else before.step
                world_size = world_size if world_size is not None or before is None else before.world_size
            launch = this_launch() if outcome == "running" or before is None else before.launch
            status = Status(
                outcome=outcome,
                reason=reason,
                lost_rank=lost_rank,
                step=step,
                world_size=world_size,
                restarts=restarts,
                launch=launch,
                time=now(),
                host=socket.gethostname(),
                pid=os.getpid(),
            )
            write_atomically(file, status.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        if outcome == "running":
            raise
        logger.error("%s: cannot say that the run is %s: %s", file, outcome, explained(error, file))
        return False
    return True


def write_failure(run_dir: str | Path, rank: int, why: str, *, lost_rank: bool = False) -> bool:
    """Say that a rank failed, unless the outcome of this attempt is known already. Returns whether it was written."""
    line = " ".join(f"rank {rank}: {why}".split())
    return write_status(run_dir, "failed", reason=line[:_REASON_LIMIT], lost_rank=lost_rank)


def failed_by_itself(run_dir: str | Path) -> bool:
    """Return True if status.json says that a rank failed for another reason than the loss of a rank."""
    status = _previous_status(run_dir)
    return status is not None and status.outcome == "failed" and not status.lost_rank


def read_status(run_dir: str | Path) -> Status | None:
    """How the run of a folder stands; None when it never started. Raises UserError if the file is damaged."""
    file = Path(run_dir) / "status.json"
    if not file.exists():
        return None
    try:
        return Status.model_validate_json(read_bounded(file, _STATUS_LIMIT))
    except ValidationError as error:
        raise UserError(f"{file}: damaged: {error.errors(include_url=False)[0]['msg']}; remove it") from None


def this_launch() -> str | None:
    """What torchrun calls the launch of this process; None if it has no name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else None


def _previous_status(run_dir: str | Path) -> Status | None:
    try:
        return read_status(run_dir)
    except UserError:
        return None


@contextmanager
def _exclusive(run_dir: str | Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; a lock that cannot be had in 2 s is done without."""
    with open(Path(run_dir) / ".status.lock", "w") as lock:
        with suppress(OSError):
            for _ in range(40):
                if try_lock(lock.fileno()):
                    break
                time.sleep(0.05)
        yield


def now() -> str:
    """ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunStatus(NamedTuple):
    """The outcome of a run's last attempt."""

    outcome: str
    """`none` before the first start, then what status.json says, but `lost` for a failure for want of a rank only, and
    `unstarted` if the last attempt is not of the launch that is asked about."""
    checkpoint: int
    """Step of the newest checkpoint; -1 if there is none."""
    reason: str

    def __str__(self) -> str:
        return f"{self.outcome} {self.checkpoint} {self.reason}".rstrip()


def standing(run_dir: str | Path, launch: str | None = None) -> RunStatus:
    """How the run of a folder stands, or if `launch` is given, how that one left it.

    Raises:
        UserError: status.json is damaged.
    """
    status = read_status(run_dir)
    step = latest_step(Path(run_dir) / "checkpoints")
    checkpoint = -1 if step is None else step
    if launch is not None and (status is None or status.launch != launch):
        return RunStatus("unstarted", checkpoint, "")
    if status is None:
        return RunStatus("none", checkpoint, "")
    return RunStatus("lost" if status.lost_rank else status.outcome, checkpoint, status.reason or "")


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
