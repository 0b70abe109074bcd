"""Record the outcome of a run in status.json, and lock its folder against other jobs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from distgan.checkpoint.directory import directory_name, newest_step
from distgan.config import Config
from distgan.distributed.peers import PeerProbe
from distgan.distributed.runtime import Runtime
from distgan.errors import LostRankError, MicroBatchMemoryError, UserError
from distgan.files import try_lock, writing
from distgan.runs.remote import RemoteRun
from distgan.runs.status import (
    RUN_LOCK,
    earlier_outcome,
    exhausted_micro_batches,
    failed_by_itself,
    ran_out_of_memory,
    read_status,
    this_launch,
    write_failure,
    write_rollback,
    write_status,
)

logger = logging.getLogger("distgan")

Result = Literal["finished", "preempted", "diverged"]

_LAST_WORDS_SECONDS = 1.0
_LOCK_SECONDS = 1.0


class Attempt:
    """One attempt at a run, as `record_outcome` yields it."""

    def __init__(self, folder: Path, runtime: Runtime, remote: RemoteRun | None) -> None:
        self.folder, self.runtime = folder, runtime
        self.remote = remote
        """The run in its object store; None for a run folder."""
        self.earlier: str | None = None
        """Outcome of the last attempt that trained, until this one does."""
        self.exhausted: dict[str, Any] | None = None
        """See `Status.exhausted`."""

    def begin(self) -> None:
        """Note that the checks are over and the training begins."""
        self.earlier = None

    def roll_back(self, why: str) -> None:
        """Log a rollback on rank 0, and write it to status.json."""
        if self.runtime.is_main:
            logger.warning("%s", why)
            write_rollback(self.folder, why)

    def finish(self, result: Result, step: int, why: str | None) -> str | None:
        """Write the outcome, and say on rank 0 where a stopped run continues. Collective: call on every rank.

        Args:
            why: this rank's reason for an early end.

        Returns:
            The reason of the first rank that has one, the same on every rank.
        """
        if self.remote is not None:
            self.remote.check_kept()
        reasons = [known for known in self.runtime.gather_objects(why) if known]
        first: str | None = reasons[0] if reasons else None
        if self.runtime.is_main:
            write_status(self.folder, result, world_size=self.runtime.world_size, step=step, reason=first)
            if self.remote is not None:
                self.remote.push_status()
            if result == "preempted":
                logger.info(
                    "%s: saved %s and stopped; start the same command again to continue", first, directory_name(step)
                )
            elif result == "diverged":
                logger.warning("%s", first)
        self.runtime.barrier()
        return first


@contextmanager
def record_outcome(config: Config, runtime: Runtime, *, fresh: bool = False) -> Iterator[Attempt]:
    """Context manager that keeps status.json current: `running` inside the block, then the outcome.

    Call `begin` and `finish` of what it yields. If the block raises, the outcome is `failed`, with the error as its
    reason. If that is before `begin`, status.json also keeps the outcome of the attempt before, because the run can
    still go on from it. A rank that fails leaves the process group without waiting; the other ranks notice the broken
    connection. Collective: call on every rank.

    Args:
        fresh: the run starts again at step 0, so that `Status.exhausted` of earlier attempts does not count.

    Raises:
        UserError: the folder is not writable, another job trains in it, or a launcher restarts a run whose failure
            did not come from a lost rank.
        LostRankError: a collective failed because another rank is gone or silent.
    """
    folder = config.run_folder
    remote = RemoteRun(config, runtime) if config.run_url is not None else None
    attempt = Attempt(folder, runtime, remote)
    restarted = any(runtime.gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    with ExitStack() as held:
        peers = held.enter_context(closing(PeerProbe(runtime)))
        with runtime.raise_on_all_ranks(), writing(folder, name=f"run_dir = {config.run_dir}"):
            folder.mkdir(parents=True, exist_ok=True)
            leads = runtime.is_main if remote is None else remote.place.leads
            locked = leads and held.enter_context(_alone_in(folder))
        if remote is not None:
            with runtime.raise_on_all_ranks():
                if runtime.is_main:
                    held.enter_context(remote.taken(locked=locked))
            remote.open()
        with runtime.raise_on_all_ranks(), writing(folder, name=f"run_dir = {config.run_dir}"):
            if runtime.is_main:
                if restarted:
                    _refuse_to_repeat(folder)
                _warn_of_hanging_restarts()
                newest = newest_step(folder / "checkpoints") if remote is None else remote.newest_step()
                attempt.earlier = earlier_outcome(folder, newest)
                attempt.exhausted = None if fresh else exhausted_micro_batches(folder)
                write_status(folder, "running", world_size=runtime.world_size, exhausted=attempt.exhausted)
                if remote is not None:
                    remote.push_status()
        attempt.earlier, attempt.exhausted = runtime.broadcast_object((attempt.earlier, attempt.exhausted))

        def fail(
            rank: int | None, why: str, *, lost_rank: bool = False, exhausted: dict[str, Any] | None = None
        ) -> bool:
            if remote is not None:
                remote.pull_status()
            earlier = attempt.earlier
            written = write_failure(folder, rank, why, lost_rank=lost_rank, exhausted=exhausted, earlier=earlier)
            return written and (remote is None or remote.push_failure())

        try:
            yield attempt
        except KeyboardInterrupt:
            fail(runtime.rank, "interrupted a second time before the run had stopped")
            raise
        except UserError as error:
            exhausted = error.exhausted if isinstance(error, MicroBatchMemoryError) else None
            written = fail(None if error.everywhere else runtime.rank, str(error), exhausted=exhausted)
            error.told = not (written or error.everywhere) and failed_by_itself(folder)
            raise
        except BaseException as error:
            if isinstance(error, Exception) and runtime.lost_contact(error):
                why = f"lost contact with another rank: {peers.missing()}: {str(error).splitlines()[0]}"
                # The rank that failed knows the cause, so let it write first. Other ranks may still query this one.
                time.sleep(_LAST_WORDS_SECONDS)
                fail(runtime.rank, why, lost_rank=True)
                lost = LostRankError(f"rank {runtime.rank} {why}")
                lost.told = ran_out_of_memory(folder)
                raise lost from error
            fail(runtime.rank, f"{type(error).__name__}: {error}")
            raise


def _refuse_to_repeat(folder: Path) -> None:
    """Raise UserError if a restart cannot help. Launchers restart after any failure.

    Only a lost rank is worth it, and a lack of memory after which the next start takes more micro-batches.
    """
    status = read_status(folder)
    if status is None or status.launch != this_launch():
        return
    if status.outcome == "failed" and not status.lost_rank and status.out_of_memory is None:
        raise UserError(
            f"{folder}: not restarted, because the last attempt did not fail from a lost rank: {status.reason}"
        )


def _warn_of_hanging_restarts() -> None:
    """Warn if restarts by torchrun may hang: restarted ranks can read the addresses of the earlier attempt."""
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if may_restart and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        logger.warning(
            "--max-restarts: restarts may hang; launch with --rdzv-backend c10d or --standalone, and set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the launcher's environment"
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Lock the run folder. Yield False if its file system has no locks.

    Raises:
        UserError: another job holds the lock.
    """
    with open(folder / RUN_LOCK, "w") as lock:
        held = False
        try:
            until = time.monotonic() + _LOCK_SECONDS
            while not (held := try_lock(lock.fileno())) and time.monotonic() < until:
                time.sleep(0.05)  # `distgan status` may be looking
            if not held:
                status = read_status(folder)
                who = f" (process {status.pid} on {status.host})" if status else ""
                raise UserError(
                    f"run_dir = {folder}: another job is training there{who}; wait for it, or set another run_dir"
                )
        except OSError:
            logger.warning("%s: its file system has no locks; make sure that no other job trains there", folder)
        yield held
