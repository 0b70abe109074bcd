"""Where a run continues: from which checkpoint, and what becomes of an earlier course of training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from distgan.checkpoint import directory, writer
from distgan.checkpoint.directory import steps
from distgan.checkpoint.restore import find_checkpoint
from distgan.config import Config, dump_config, flatten, parse_config
from distgan.data.kinds.images import JPEG_DECODER
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.files import write_atomically, writing
from distgan.runs.folder import is_own, mark_own_best, set_aside, set_aside_later
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")


def resume_run(config: Config, state: TrainingState, runtime: Runtime, resume: str, accept: frozenset[str]) -> None:
    """Bring `state` to where the run continues, and write the resolved config. Every rank calls it.

    Raises:
        UserError: the checkpoint asked for is missing, damaged or does not fit, or the folder cannot be written to.
    """
    folder = Path(config.run_dir)
    with runtime.raise_on_all_ranks(), writing(folder, name=f"run_dir = {folder}"):
        if runtime.is_main and resume == "never":
            set_aside(folder)
    path, kept = runtime.broadcast_object(_where_to_resume(folder, resume) if runtime.is_main else None)
    if isinstance(path, UserError):
        raise path
    if path is not None:
        # From here on a rank may fail by itself, so that none may wait for others.
        then = state.load(path, accept)
        if state.progress.best is not None and state.progress.best["step"] not in kept:
            state.progress.best = None
        with writing(folder, name=f"run_dir = {folder}"):
            if runtime.is_main and then.best is not None and then.best.step == then.step:
                mark_own_best(folder, path, then.best)
            if runtime.is_main and resume != "auto":
                if is_own(folder, path):
                    set_aside_later(folder, then.step)
                else:
                    set_aside(folder)
        if runtime.is_main:
            world = "" if then.world_size == runtime.world_size else f" (saved on {then.world_size} ranks)"
            logger.info("resuming from %s%s, at stream position %d", path, world, state.progress.position)
            decoder = then.versions.get("JPEG decoder", JPEG_DECODER)
            if decoder != JPEG_DECODER and state.index.has_jpegs:
                logger.warning(
                    "JPEGs are decoded by %s, and were by %s at that checkpoint: pixels may differ by a level, so that "
                    "the run is not bitwise what it would have been; install that decoder to make it so",
                    JPEG_DECODER, decoder,
                )  # fmt: skip
            for change in _changes(parse_config(then.config, source=f"{path}/state.json"), config):
                logger.info("changed since that checkpoint: %s", change)
    if runtime.is_main:
        with writing(folder / "config.yaml"):
            write_atomically(folder / "config.yaml", dump_config(config).encode())


def _where_to_resume(folder: Path, resume: str) -> tuple[Path | UserError | None, list[int]]:
    """The checkpoint, and the steps of all that are kept of its course. A best one that is not, as after going back, is
    nothing to compare with."""
    path = _checkpoint_to_resume(folder, resume)
    own = isinstance(path, Path) and is_own(folder, path)
    return path, steps(folder / "checkpoints") if own else []


def open_writer(config: Config) -> writer.CheckpointWriter:
    """The writer of this run's checkpoints, for rank 0."""
    return writer.CheckpointWriter(Path(config.run_dir) / "checkpoints", keep=config.checkpoint.keep)


def _checkpoint_to_resume(folder: Path, resume: str) -> Path | UserError | None:
    """The checkpoint to start from; an error is returned rather than raised, for all ranks to raise."""
    try:
        if resume == "never":
            return None
        if resume != "auto":
            return find_checkpoint(Path(resume))
        newest = directory.newest_valid(folder / "checkpoints")
        if newest is None and steps(folder / "checkpoints"):
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
