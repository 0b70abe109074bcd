"""The divergence guard: whether the run has diverged for good, and the checkpoint that it goes back to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from distgan.checkpoint.directory import directory_name, read_best, verify
from distgan.checkpoint.uploads import Uploads
from distgan.checkpoint.writer import CheckpointWriter
from distgan.data.storage.locations import public_name
from distgan.data.storage.store_errors import StoreError
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.monitoring.divergence import why_diverged
from distgan.training.state import TrainingState

_PAUSES = (0.0, 1.0, 5.0, 15.0, 40.0)
"""Seconds before each request to a store, without whose answer nothing can be decided."""


class Decision(NamedTuple):
    """Action of `training.on_divergence` on a divergence. Equal on all ranks."""

    reason: str
    """The divergence and the action, in one line."""
    checkpoint: Path | None
    """Checkpoint to go back to; None stops the run."""


def metric_divergence(state: TrainingState) -> str | None:
    """Return how the evaluations show that the run has diverged for good; None if they do not, or without a guard."""
    progress, guard = state.progress, state.config.training.on_divergence
    best = progress.best["value"] if progress.best is not None else None
    return None if guard is None else why_diverged(progress.divergence, guard, best)


def skipped_updates(state: TrainingState) -> str | None:
    """Return which player skipped `training.max_skipped_updates` updates in a row since the last call, or None."""
    found = None
    for player in state.players:
        streak = int(player.longest_streak.item())
        player.longest_streak.copy_(player.skipped_in_a_row)
        if found is None and streak >= state.config.training.max_skipped_updates:
            found = (
                f"{streak} updates of the {player.role} in a row had a loss or gradient that is not finite and were "
                "skipped"
            )
    return found


def fail_with_skipped_updates(state: TrainingState, writer: CheckpointWriter, runtime: Runtime, why: str) -> NoReturn:
    """Raise UserError for a player that skipped many updates in a row, without a guard. Collective."""
    good = runtime.broadcast_object(writer.last_good_name)
    raise UserError(
        f"step {state.progress.step}: {why}; last good checkpoint: {good}; lower the learning rates, add a gradient "
        "penalty, or set training.mixed_precision=no",
        everywhere=True,
    )


def decide(state: TrainingState, writer: CheckpointWriter, runtime: Runtime, why: str) -> Decision:
    """Decide on the action on a divergence. Collective: call on every rank.

    Args:
        why: the divergence.

    Raises:
        UserError: the run is in a store that does not answer, or does not take the best checkpoint.
    """
    guard, progress = state.config.training.on_divergence, state.progress
    assert guard is not None
    done = len(progress.rollbacks)
    reason, folder = f"step {progress.step}: {why}", state.config.run_folder
    writer.upload_rest(_PAUSES)
    best = runtime.run_on_main(lambda _: _best_checkpoint(folder / "checkpoints", writer))
    if best.path is None:
        return Decision(
            f"{reason}; {'not rolled back, because ' if guard.action == 'rollback' else ''}{best.missing}", None
        )
    if guard.action == "stop":
        return Decision(f"{reason}; continue from the best checkpoint with --resume {best.path}", None)
    if done >= guard.max_rollbacks:
        limit = f"training.on_divergence.max_rollbacks = {guard.max_rollbacks}"
        return Decision(f"{reason}; not rolled back again: {limit}", None)
    told = f"{reason}; rollback {done + 1} of {guard.max_rollbacks} to step {best.step}, with other samples and noise"
    return Decision(told, best.path)


class _Best(NamedTuple):
    path: Path | None
    step: int = 0
    missing: str = ""
    """Why there is none."""


def _best_checkpoint(folder: Path, writer: CheckpointWriter) -> _Best:
    """Return the best checkpoint, verified, or why there is none. Call it on rank 0 only.

    Raises:
        UserError: the store does not answer, or does not have the checkpoint yet. A run is not stopped for that.
    """
    uploads = writer.uploads
    uploaded = None if uploads is None else _uploaded_steps(uploads)
    try:
        best = read_best(folder)
        if best is None:
            return _Best(None, missing="there is no best checkpoint yet")
        path = folder / directory_name(best.step)
        if uploaded is None:
            verify(path)
    except UserError as error:
        return _Best(None, missing=f"the best checkpoint cannot be loaded: {error}")
    if uploads is not None and uploaded is not None and best.step not in uploaded:
        if not uploads.done:
            raise _undecided(uploads, f"the best checkpoint, of step {best.step}, is not uploaded: {uploads.why}")
        return _Best(None, missing="the store does not have the best checkpoint")
    return _Best(path, best.step)


def _uploaded_steps(uploads: Uploads) -> set[int]:
    """Return the steps of the checkpoints in the store. Raises UserError if it does not answer in a minute."""
    why = ""
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            return set(uploads.remote.complete())
        except StoreError as error:
            why = f"cannot read the checkpoints: {error}"
    raise _undecided(uploads, why)


def _undecided(uploads: Uploads, why: str) -> UserError:
    where = public_name(uploads.remote.objects.url)
    return UserError(
        f"run_dir = {where}: the run has diverged, and training.on_divergence needs the store: {why}; start the same "
        "command again to continue"
    )
