"""The run folder: how a run starts in it, and what is said there of how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from distgan.config import Config, dump_config, flatten, parse_config
from distgan.distributed.runtime import Runtime
from distgan.errors import LostRankError, UserError
from distgan.files import write_atomically
from distgan.training import checkpoint, preemption
from distgan.training.checkpoint_folder import directory_name
from distgan.training.restore import find_checkpoint
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")

Result = Literal["finished", "preempted"]

HISTORY = ("checkpoints", "metrics.jsonl", "tensorboard", "samples")
"""What belongs to one course of training, and is set aside when a run starts over."""


def prepare(config: Config, state: TrainingState, runtime: Runtime, resume: str, accept: frozenset[str]) -> None:
    """Bring `state` to where the run continues, and write the resolved config. Every rank calls it.

    Raises:
        UserError: the checkpoint asked for is missing, damaged or does not fit.
    """
    folder = Path(config.run_dir)
    if runtime.is_main and resume == "never":
        set_aside(folder)
    path = runtime.broadcast_object(_checkpoint_to_resume(folder, resume) if runtime.is_main else None)
    if isinstance(path, UserError):
        raise path
    if path is not None:
        then = state.load(path, accept)
        if runtime.is_main:
            world = "" if then["world_size"] == runtime.world_size else f" (saved on {then['world_size']} ranks)"
            logger.info("resuming from %s%s, at stream position %d", path, world, state.progress.position)
            for change in _changes(parse_config(then["config"], source=f"{path}/state.json"), config):
                logger.info("changed since that checkpoint: %s", change)
    if runtime.is_main:
        write_atomically(folder / "config.yaml", dump_config(config).encode())


def set_aside(folder: Path) -> None:
    """Move an earlier course of training into `previous-N`; nothing is deleted."""
    found = [folder / name for name in HISTORY if (folder / name).exists()]
    if not found:
        return
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    logger.info("starting over; what was in %s is now in %s", folder, aside)


def open_writer(config: Config) -> checkpoint.CheckpointWriter:
    """The writer of this run's checkpoints, for rank 0."""
    return checkpoint.CheckpointWriter(Path(config.run_dir) / "checkpoints", keep=config.checkpoint.keep)


@contextmanager
def outcome(config: Config, runtime: Runtime) -> Iterator[Callable[[Result], None]]:
    """Keeps status.json true: `running` inside, then what the yielded function is told, or `failed` with the reason.

    A rank that fails leaves the process group without waiting: its peers notice by the broken connection.
    """
    folder = Path(config.run_dir)

    def finish(result: Result) -> None:
        runtime.barrier()
        if runtime.is_main:
            preemption.write_status(folder, result, world_size=runtime.world_size, step=newest_step(folder))
        runtime.barrier()
        runtime.close()

    with runtime.together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if runtime.is_main:
                preemption.write_status(folder, "running", world_size=runtime.world_size)
        except OSError as error:
            raise UserError(
                f"run_dir = {config.run_dir}: cannot write there: {error.strerror}; choose a writable folder"
            ) from None
    try:
        yield finish
    except KeyboardInterrupt:
        preemption.write_failure(folder, runtime.rank, "interrupted a second time, before it had stopped")
        raise
    except UserError as error:
        preemption.write_failure(folder, runtime.rank, str(error))
        raise
    except Exception as error:
        if runtime.lost_contact(error):
            # The rank that failed knows why, and should be the one to say it.
            time.sleep(1.0)
            lost = LostRankError(f"rank {runtime.rank} lost contact with another rank: {str(error).splitlines()[0]}")
            preemption.write_failure(folder, runtime.rank, str(lost))
            raise lost from error
        preemption.write_failure(folder, runtime.rank, f"{type(error).__name__}: {error}")
        raise


def newest_name(folder: Path) -> str:
    """Name of the newest checkpoint of a run folder, for messages."""
    step = newest_step(folder)
    return "none" if step is None else str(folder / "checkpoints" / directory_name(step))


def newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint of a run folder, not verified; None without one."""
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return max(steps, default=None)


def _checkpoint_to_resume(folder: Path, resume: str) -> Path | UserError | None:
    """The checkpoint to start from; an error is returned rather than raised, for all ranks to raise."""
    try:
        if resume == "never":
            return None
        if resume != "auto":
            return find_checkpoint(Path(resume))
        newest = checkpoint.newest_valid(folder / "checkpoints")
        if newest is None and newest_step(folder) is not None:
            raise UserError(
                f"{folder / 'checkpoints'}: none of the checkpoints there is valid; restore one, or start over with "
                "--resume never, which sets them aside"
            )
        return newest
    except UserError as error:
        return error


def _changes(then: Config, now: Config) -> Iterator[str]:
    before = flatten(then)
    for key, value in flatten(now).items():
        if before.get(key) != value:
            yield f"{key} was {before.get(key)}, is {value}"
