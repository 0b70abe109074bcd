"""The run folder: how a run starts in it, and what is said there of how it ended."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Literal

from distgan.checkpoint import writer
from distgan.checkpoint.directory import Best, directory_name, steps, write_best
from distgan.checkpoint.restore import find_checkpoint
from distgan.config import Config, dump_config, flatten, parse_config
from distgan.data.kinds.images import JPEG_DECODER
from distgan.distributed.peers import PeerProbe
from distgan.distributed.runtime import Runtime
from distgan.errors import LostRankError, UserError
from distgan.files import explained, reason, write_atomically, writing
from distgan.runs.status import failed_by_itself, read_status, this_launch, write_failure, write_status
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")

Result = Literal["finished", "preempted"]

_LAST_WORDS_SECONDS = 1.0

HISTORY = ("checkpoints", "metrics.jsonl", "tensorboard", "samples")
"""What belongs to one course of training, and is set aside when a run starts over."""


def prepare(config: Config, state: TrainingState, runtime: Runtime, resume: str, accept: frozenset[str]) -> None:
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
                if _is_own(folder, path):
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


def mark_own_best(folder: Path, path: Path, best: Best) -> None:
    """Mark a checkpoint of this run as its best. It was to be marked once it was written: a kill may have come between.

    Raises:
        OSError: the folder cannot be written to.
    """
    if _is_own(folder, path):
        write_best(path.parent, best)


def _is_own(folder: Path, path: Path) -> bool:
    """Whether a checkpoint is of the course of training that a run folder is at."""
    return path.resolve().parent == (folder / "checkpoints").resolve()


def _where_to_resume(folder: Path, resume: str) -> tuple[Path | UserError | None, list[int]]:
    """The checkpoint, and the steps of all that are kept of its course. A best one that is not, as after going back, is
    nothing to compare with."""
    path = _checkpoint_to_resume(folder, resume)
    own = isinstance(path, Path) and _is_own(folder, path)
    return path, steps(folder / "checkpoints") if own else []


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
        best = writer.read_best(checkpoints)
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


def open_writer(config: Config) -> writer.CheckpointWriter:
    """The writer of this run's checkpoints, for rank 0."""
    return writer.CheckpointWriter(Path(config.run_dir) / "checkpoints", keep=config.checkpoint.keep)


@contextmanager
def outcome(config: Config, runtime: Runtime) -> Iterator[Callable[[Result, int, str | None], None]]:
    """Keeps status.json true: `running` inside, then what the yielded function is told, or `failed` with the reason.

    That function takes the result, the step, and the reason of an early end. A rank that fails leaves the process group
    without waiting: its peers notice by the broken connection.

    Raises:
        UserError: the folder cannot be written to, another job trains in it, or a launcher repeats what failed by
            itself.
    """
    folder = Path(config.run_dir)

    def finish(result: Result, step: int, reason: str | None) -> None:
        reasons = [known for known in runtime.gather_objects(reason) if known]
        if runtime.is_main:
            why = reasons[0] if reasons else None
            write_status(folder, result, world_size=runtime.world_size, step=step, reason=why)
        runtime.barrier()

    restarted = any(runtime.gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    with ExitStack() as held:
        roll = held.enter_context(closing(PeerProbe(runtime)))
        with runtime.raise_on_all_ranks():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if runtime.is_main:
                    held.enter_context(_alone_in(folder))
                    if restarted:
                        _refuse_to_repeat(folder)
                    _warn_of_hanging_restarts()
                    write_status(folder, "running", world_size=runtime.world_size)
            except OSError as error:
                raise UserError(
                    f"run_dir = {config.run_dir}: cannot write there: {reason(explained(error, folder))}"
                ) from None
        try:
            yield finish
        except KeyboardInterrupt:
            write_failure(folder, runtime.rank, "interrupted a second time, before it had stopped")
            raise
        except UserError as error:
            written = write_failure(folder, runtime.rank, str(error))
            error.told = not (written or error.everywhere) and failed_by_itself(folder)
            raise
        except BaseException as error:
            if isinstance(error, Exception) and runtime.lost_contact(error):
                why = f"lost contact with another rank: {roll.missing()}: {str(error).splitlines()[0]}"
                # The rank that failed knows why, and should be the one to say it. And others may still ask this one.
                time.sleep(_LAST_WORDS_SECONDS)
                write_failure(folder, runtime.rank, why, lost_rank=True)
                raise LostRankError(f"rank {runtime.rank} {why}") from error
            write_failure(folder, runtime.rank, f"{type(error).__name__}: {error}")
            raise


def _refuse_to_repeat(folder: Path) -> None:
    """A launcher starts all ranks again whatever has ended one; only the loss of a rank is mended by that."""
    status = read_status(folder)
    if status is None or status.launch != this_launch():
        return
    if status.outcome == "failed" and not status.lost_rank:
        raise UserError(f"not restarted, because the attempt before failed by itself: {status.reason}")


def _warn_of_hanging_restarts() -> None:
    """torchrun's restarted ranks may find the addresses of those before them, unless each attempt has its own store."""
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if may_restart and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        logger.warning(
            "restarts by --max-restarts may hang unless the launcher has --rdzv-backend c10d, or --standalone, "
            "and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the run folder, as far as its file system has locks. Raises UserError if another job holds it."""
    with open(folder / ".run.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            status = read_status(folder)
            who = f" (process {status.pid} on {status.host})" if status else ""
            raise UserError(f"run_dir = {folder}: another job is training there{who}; choose another run_dir") from None
        except OSError:
            logger.warning("%s: its file system has no locks; take care that no other job trains there", folder)
        yield


def _checkpoint_to_resume(folder: Path, resume: str) -> Path | UserError | None:
    """The checkpoint to start from; an error is returned rather than raised, for all ranks to raise."""
    try:
        if resume == "never":
            return None
        if resume != "auto":
            return find_checkpoint(Path(resume))
        newest = writer.newest_valid(folder / "checkpoints")
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
