"""Status of a run in its `status.json`. Launchers turn every exit code into 1, so the run itself records its outcome.

Job scripts read it as one line (`distgan status`) and decide whether to requeue.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from distgan.checkpoint.directory import newest_step
from distgan.errors import UserError, without_secrets
from distgan.files import explained, read_bounded, try_lock, write_atomically

logger = logging.getLogger("distgan")

RUN_LOCK = ".run.lock"
"""File that the process of rank 0 locks in its run folder while it trains; for a run in a store, also other nodes'."""
_REASON_LIMIT = 2000
STATUS_LIMIT = 64 << 10

Outcome = Literal["running", "finished", "preempted", "diverged", "failed"]


def _with_number(exhausted: dict[str, Any]) -> dict[str, Any]:
    found = exhausted.get("micro_batches")
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"micro_batches: found {found!r}, expected a number from 1")
    return exhausted


class Status(BaseModel):
    """Content of status.json."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    reason: str | None = None
    """Reason of a failure, preemption, divergence or early finish, or the last rollback, in one line."""
    lost_rank: bool = False
    """True if the run failed only because a rank was lost; a restart can help."""
    out_of_memory: int | None = None
    """Number of micro-batches per update with which memory ran out, if the next start takes more; else None."""
    exhausted: Annotated[dict[str, Any], AfterValidator(_with_number)] | None = None
    """The last such number as `micro_batches`, with the settings for which it was found. Later attempts keep it."""
    step: int | None = None
    world_size: int | None = None
    restarts: int = 0
    """Number of earlier attempts in the same run folder."""
    earlier: str | None = None
    """Outcome of the last attempt that trained, if this one failed before it did: the run can go on from there."""
    launch: str | None = None
    """torchrun's id (`--rdzv-id`) of the launch that the attempt belongs to."""
    time: str
    """Time of writing: ISO 8601, UTC."""
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
    exhausted: dict[str, Any] | None = None,
    earlier: str | None = None,
) -> bool:
    """Write the status of the run. `running` begins an attempt; the first other outcome of an attempt is final.

    Therefore no later failure or preemption, on any rank or node, replaces the first failure.

    Args:
        exhausted: see `Status.exhausted`. A failure with it ran out of memory; outcomes without it keep what is there.

    Returns:
        True if the status was written. A disk error is logged, except for `running`.

    Raises:
        OSError: the folder is not writable when an attempt begins.
    """
    file = Path(run_dir) / "status.json"
    try:
        with _exclusive(run_dir):
            before = _previous_status(run_dir)
            out_of_memory = exhausted["micro_batches"] if outcome == "failed" and exhausted is not None else None
            if outcome == "running":
                restarts = before.restarts + 1 if before else 0
            elif before and before.outcome != "running":
                return False
            else:
                restarts = before.restarts if before else 0
                step = step if step is not None or before is None else before.step
                world_size = world_size if world_size is not None or before is None else before.world_size
                exhausted = exhausted if exhausted is not None or before is None else before.exhausted
            launch = this_launch() if outcome == "running" or before is None else before.launch
            status = Status(
                outcome=outcome,
                reason=without_secrets(reason) if reason else reason,
                lost_rank=lost_rank,
                out_of_memory=out_of_memory,
                exhausted=exhausted,
                step=step,
                world_size=world_size,
                restarts=restarts,
                earlier=earlier,
                launch=launch,
                time=now(),
                host=socket.gethostname(),
                pid=os.getpid(),
            )
            write_atomically(file, status.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        if outcome == "running":
            raise
        logger.error("%s: cannot write that the run is %s: %s", file, outcome, explained(error, file))
        return False
    return True


def write_rollback(run_dir: str | Path, reason: str) -> None:
    """Add the reason of a rollback to the status of the running attempt. A disk error is logged."""
    file = Path(run_dir) / "status.json"
    try:
        with _exclusive(run_dir):
            status = _previous_status(run_dir)
            if status is not None and status.outcome == "running":
                changed = status.model_copy(update={"reason": without_secrets(reason)[:_REASON_LIMIT], "time": now()})
                write_atomically(file, changed.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        logger.error("%s: cannot write the rollback: %s", file, explained(error, file))


def write_failure(
    run_dir: str | Path,
    rank: int | None,
    why: str,
    *,
    lost_rank: bool = False,
    exhausted: dict[str, Any] | None = None,
    earlier: str | None = None,
) -> bool:
    """Write that a rank failed, unless this attempt already has an outcome. Return True if it was written.

    Args:
        rank: the rank that failed; None if all ranks fail alike.
        exhausted: see `Status.exhausted`; None if the rank did not run out of memory.
        earlier: see `Status.earlier`.
    """
    line = " ".join((why if rank is None else f"rank {rank}: {why}").split())
    return write_status(
        run_dir,
        "failed",
        reason=line[:_REASON_LIMIT],
        lost_rank=lost_rank,
        exhausted=exhausted,
        earlier=earlier,
    )


def earlier_outcome(run_dir: str | Path, newest: int | None) -> str | None:
    """Return what `Status.earlier` says if the next attempt fails before it trains; None without a checkpoint.

    Call it while no other attempt runs.

    Args:
        newest: step of the newest checkpoint, or None.
    """
    status = _previous_status(run_dir)
    if status is None or newest is None:
        return None
    if status.earlier is not None:
        return status.earlier
    outcome = "killed" if status.outcome == "running" else status.outcome
    step = "" if status.step is None else f" at step {status.step}"
    return f"{outcome}{step}" + (f" ({status.reason})" if status.reason else "")


def exhausted_micro_batches(run_dir: str | Path) -> dict[str, Any] | None:
    """Return `Status.exhausted` of the last attempt."""
    status = _previous_status(run_dir)
    return status.exhausted if status is not None else None


def ran_out_of_memory(run_dir: str | Path) -> bool:
    """Return True if status.json records a failure after which the next start takes more micro-batches."""
    status = _previous_status(run_dir)
    return status is not None and status.out_of_memory is not None


def failed_by_itself(run_dir: str | Path) -> bool:
    """Return True if status.json records a failure that did not come from a lost rank."""
    status = _previous_status(run_dir)
    return status is not None and status.outcome == "failed" and not status.lost_rank


def read_status(run_dir: str | Path) -> Status | None:
    """Return the status of a run; None if it never started. Raises UserError if status.json is damaged."""
    file = Path(run_dir) / "status.json"
    if not file.exists():
        return None
    try:
        return Status.model_validate_json(read_bounded(file, STATUS_LIMIT))
    except ValidationError as error:
        raise UserError(f"{file}: damaged: {error.errors(include_url=False)[0]['msg']}; remove it") from None


def this_launch() -> str | None:
    """Return torchrun's id of this process's launch; None if the launch has no id."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else None


def _previous_status(run_dir: str | Path) -> Status | None:
    try:
        return read_status(run_dir)
    except UserError:
        return None


@contextmanager
def _exclusive(run_dir: str | Path) -> Iterator[None]:
    """Lock status.json, if the file system has locks. After 2 s, continue without the lock."""
    with open(Path(run_dir) / ".status.lock", "w") as lock:
        with suppress(OSError):
            for _ in range(40):
                if try_lock(lock.fileno()):
                    break
                time.sleep(0.05)
        yield


def now() -> str:
    """Return the current time: ISO 8601, UTC, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunStatus(NamedTuple):
    """Outcome of a run's last attempt."""

    outcome: str
    """Outcome from status.json, with five more values.

    `none`: the run never started. `lost`: it failed only because a rank was lost. `out-of-memory`: it
    failed because memory ran out, and the next start takes smaller micro-batches. `killed`: it was running on this
    host, and no process trains it any more. `unstarted`: the last attempt does not belong to the given launch. """
    checkpoint: int
    """Step of the newest checkpoint; -1 if there is none."""
    reason: str

    def __str__(self) -> str:
        return f"{self.outcome} {self.checkpoint} {self.reason}".rstrip()


def standing(run_dir: str | Path, launch: str | None = None) -> RunStatus:
    """Return the status of a run or, if `launch` is given, of that launch of it.

    Raises:
        UserError: status.json is damaged.
    """
    status = read_status(run_dir)
    killed = status is not None and was_killed(run_dir, status)
    if killed and (again := read_status(run_dir)) != status:
        status, killed = again, False  # it ended by itself just now
    step = newest_step(Path(run_dir) / "checkpoints")
    return describe(status, -1 if step is None else step, launch, killed=killed)


def describe(status: Status | None, checkpoint: int, launch: str | None, *, killed: bool) -> RunStatus:
    """Return the status of a run from its status.json and the step of its newest checkpoint, or -1.

    Args:
        killed: the status is `running`, but no process trains the run.
    """
    if launch is not None and (status is None or status.launch != launch):
        return RunStatus("unstarted", checkpoint, "")
    if status is None:
        return RunStatus("none", checkpoint, "")
    reason = status.reason or ""
    if status.earlier is not None:
        reason += f"; before this attempt the run was {status.earlier}"
    outcome = "lost" if status.lost_rank else "killed" if killed else status.outcome
    if status.out_of_memory is not None:
        return RunStatus("out-of-memory", checkpoint, reason)
    return RunStatus(outcome, checkpoint, reason)


def was_killed(run_dir: str | Path, status: Status) -> bool:
    """Return True if the status is `running`, but the process that wrote it was on this host and is gone.

    The lock of the run folder decides, because the kernel releases it when its process ends. Without a lock, the
    process ID decides.
    """
    if status.outcome != "running" or status.host != socket.gethostname():
        return False
    try:
        # A run that starts at this moment tries again.
        with open(Path(run_dir) / RUN_LOCK, "rb") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, or an earlier version's folder
        return Path("/proc").is_dir() and not Path(f"/proc/{status.pid}").exists()
    return True
