"""Saving and resuming a run: find the checkpoint, load it, and move aside what belongs to a discarded run."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from distgan.checkpoint import directory
from distgan.checkpoint.averages import remove_later_snapshots
from distgan.checkpoint.contents import Description, load_description
from distgan.checkpoint.directory import steps
from distgan.checkpoint.loading import find_checkpoint
from distgan.checkpoint.writer import CheckpointWriter
from distgan.config import Config, dump_config, flatten, parse_config
from distgan.data.kinds.images import JPEG_DECODER
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError, counted
from distgan.files import write_atomically, writing
from distgan.monitoring.divergence import Divergence
from distgan.runs.folder import is_own, mark_own_best, set_aside, set_aside_averages, set_aside_later
from distgan.runs.remote import RemoteRun
from distgan.training.inputs import Feed
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")

_PAUSES = (0.0, 1.0, 5.0)
"""Seconds before each attempt to upload what is left."""


def resume_run(
    config: Config,
    state: TrainingState,
    runtime: Runtime,
    resume: str,
    accept: frozenset[str],
    remote: RemoteRun | None = None,
    *,
    rolls_back: bool = False,
) -> None:
    """Load the checkpoint to resume from into `state` and write the resolved config. Collective: call on every rank.

    Args:
        remote: the run in its object store, if it is in one.
        rolls_back: the run has diverged since that checkpoint of its own, and continues on other draws.

    Raises:
        UserError: the checkpoint is missing, damaged or incompatible, or the run folder is not writable.
    """
    folder = config.run_folder
    if remote is not None:
        path, kept = _where_to_resume_remote(remote, resume, runtime)
    else:
        with runtime.raise_on_all_ranks(), writing(folder, name=f"run_dir = {folder}"):
            if runtime.is_main and resume == "never":
                set_aside(folder)
        path, kept = runtime.broadcast_object(_where_to_resume(folder, resume) if runtime.is_main else None)
        if isinstance(path, UserError):
            raise path
    if path is not None:
        then = state.load(path, accept)
        if state.progress.best is not None and state.progress.best["step"] not in kept:
            state.progress.best, state.progress.divergence = None, Divergence()
        # From here on rank 0 may fail alone, so no rank may wait for another.
        with writing(folder, name=f"run_dir = {folder}"):
            if runtime.is_main and then.best is not None and then.best.step == then.step:
                mark_own_best(folder, path, then.best)
            if runtime.is_main and resume != "auto":
                if is_own(folder, path):
                    set_aside_later(folder, then.step, curves=rolls_back)
                    if remote is not None:
                        remote.go_back(then.step)
                else:
                    set_aside(folder)
        if rolls_back:
            state.set_rollbacks((*state.progress.rollbacks, then.step))
        if runtime.is_main:
            world = "" if then.world_size == runtime.world_size else f" (saved on {counted(then.world_size, 'rank')})"
            logger.info("resuming from %s%s at stream position %d", path, world, state.progress.position)
            decoder = then.versions.get("JPEG decoder", JPEG_DECODER)
            if decoder != JPEG_DECODER and state.index.has_jpegs:
                logger.warning(
                    "JPEG decoder: found %s, the checkpoint was saved with %s; pixels may differ by one level, so the "
                    "resume is not bitwise; install %s for a bitwise resume",
                    JPEG_DECODER, decoder, decoder,
                )  # fmt: skip
            for change in _changes(parse_config(then.config, source=f"{path}/state.json"), config):
                logger.info("changed since the checkpoint: %s", change)
    if runtime.is_main:
        with writing(folder / "averages"):
            if path is None:  # those of an attempt that saved no checkpoint are of other weights
                set_aside_averages(folder)
            remove_later_snapshots(folder, state.progress.images)
        if remote is not None:
            with remote.requests("remove later averages"):
                remote.mirror.forget_later_averages(state.progress.images)
        with writing(folder / "config.yaml"):
            write_atomically(folder / "config.yaml", dump_config(config).encode())


def peek(
    config: Config, runtime: Runtime, resume: str, remote: RemoteRun | None = None
) -> tuple[Path, Description] | None:
    """Return this node's path of the checkpoint that `resume_run` will load, and its description. Collective."""
    # The writer publishes one of a killed process.
    with runtime.raise_on_all_ranks(), closing(open_writer(config, runtime, remote)):
        if remote is not None:
            path: Path | UserError | None = _where_to_resume_remote(remote, resume, runtime)[0]
        else:
            path = _checkpoint_to_resume(config.run_folder, resume) if runtime.is_main else None
        if isinstance(path, UserError):
            raise path
        found = load_description(path) if path is not None else None
    there, described = runtime.broadcast_object((path, found))
    return None if described is None else (path or there, described)


def _where_to_resume(folder: Path, resume: str) -> tuple[Path | UserError | None, list[int]]:
    """Return the checkpoint to resume from, and the steps of all checkpoints in its run folder.

    The best checkpoint counts only if it is among those steps. After going back to an earlier step it may not be.
    """
    path = _checkpoint_to_resume(folder, resume)
    own = isinstance(path, Path) and is_own(folder, path)
    return path, steps(folder / "checkpoints") if own else []


def _where_to_resume_remote(remote: RemoteRun, resume: str, runtime: Runtime) -> tuple[Path | None, list[int]]:
    """Do the same for a run in an object store, and copy its checkpoint to each node. Collective."""
    if resume == "auto":
        return remote.fetch()
    # As rank 0 has it: after a divergence, the path is that in the folder of its node.
    if (step := runtime.broadcast_object(remote.own_step(resume))) is not None:
        return remote.fetch(step)
    with runtime.raise_on_all_ranks():
        newest = remote.newest_step() if runtime.is_main else None
        if newest is not None:
            raise UserError(
                f"--resume {resume}: {remote.name} has checkpoints up to step {newest}, which cannot be moved aside in "
                f"a store; set another run_dir, or resume from {remote.name}/checkpoints/step-N"
            )
        path = None if resume == "never" else find_checkpoint(resume)
    return path, []


def open_writer(config: Config, runtime: Runtime, remote: RemoteRun | None = None) -> CheckpointWriter:
    """Return this rank's checkpoint writer. Collective: call on every rank."""
    folder, keep = config.run_folder / "checkpoints", config.checkpoint.keep
    uploads = remote.uploads() if remote is not None else None
    writer = CheckpointWriter(folder, keep=keep, ranks=runtime, background=runtime.background, uploads=uploads)
    if uploads is not None:
        uploads.settle(runtime.background)
        if not writer.upload_rest(_PAUSES):
            raise UserError(f"{uploads.remote.objects.url}: cannot upload the last checkpoint: {uploads.why}",
                            everywhere=True)  # fmt: skip
    return writer


def upload_rest(writer: CheckpointWriter, remote: RemoteRun, runtime: Runtime) -> None:
    """Upload at the end of a run what is left. Collective: call on every rank.

    Raises:
        UserError: the store does not take it, or another job has taken the run over.
    """
    if writer.upload_rest(_PAUSES):
        return
    remote.check_kept()
    waiting, why, host = runtime.broadcast_object((*writer.not_uploaded, socket.gethostname()))
    raise UserError(
        f"run_dir = {remote.name}: the checkpoint of step {', '.join(map(str, waiting))} is not uploaded: {why}; it is "
        f"in {writer.folder} on {host}; start the same command there again to upload it",
        everywhere=True,
    )


def save(
    state: TrainingState,
    feed: Feed,
    writer: CheckpointWriter,
    runtime: Runtime,
    *,
    last: bool = False,
    is_best: bool = False,
) -> bool:
    """Write a checkpoint of the current step. Collective: call on every rank.

    Only the last and the best checkpoint block the loop. The ranks then wait for each other without a timeout, because
    a slow disk is not a lost rank.

    Returns:
        True on rank 0 if the checkpoint is on disk or being written.

    Raises:
        UserError: the last checkpoint of the run cannot be written.
    """
    feed.share_failures()
    progress = state.progress
    # The best EMA weights are saved anyway: skipped updates did not change them.
    if not (last or is_best) and max(player.skipped_in_a_row.item() for player in state.players) > 1:
        if runtime.is_main:
            logger.warning("step %d: checkpoint skipped, because the last updates were not finite", progress.step)
        return False
    description, tensors = state.description(runtime), state.tensors()
    if not (last or is_best):
        return writer.save(progress.step, tensors, description) and runtime.is_main
    saved = writer.save(progress.step, tensors, description, blocking=True, last=last)
    if last and not saved:
        saved = writer.save(progress.step, tensors, description, blocking=True, last=last)
    if last and not saved:
        raise UserError(
            f"{writer.folder}: the final checkpoint of step {progress.step} cannot be written (see the error "
            f"above); last good checkpoint: {writer.last_good_name}; fix the disk, "
            "then run the same command again to continue from there",
            everywhere=True,
        )
    if is_best and progress.best is not None and runtime.is_main:
        writer.mark_best(**progress.best)
    return saved and runtime.is_main


def _checkpoint_to_resume(folder: Path, resume: str) -> Path | UserError | None:
    """Return the checkpoint to resume from. An error is returned, not raised, so that all ranks raise it."""
    try:
        if resume == "never":
            return None
        if resume != "auto":
            return find_checkpoint(resume)
        newest = directory.newest_valid(folder / "checkpoints")
        if newest is None and steps(folder / "checkpoints"):
            raise UserError(
                f"{folder / 'checkpoints'}: none of the checkpoints there is valid; restore one, or start at step 0 "
                "with --resume never, which moves them to previous-N"
            )
        return newest
    except UserError as error:
        return error


def _changes(then: Config, now: Config) -> Iterator[str]:
    before = flatten(then)
    for key, value in flatten(now).items():
        if before.get(key) != value:
            yield f"{key}: {before.get(key)} -> {value}"
