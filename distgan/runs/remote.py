"""A run in an object store: each node trains in a folder of its own, whose content rank 0 and the writer upload."""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from distgan.checkpoint.directory import directory_name, steps
from distgan.checkpoint.remote import RemoteCheckpoints, TakenError, step_of
from distgan.checkpoint.uploads import Place, Uploads
from distgan.config import Config
from distgan.data.storage.locations import public_name
from distgan.data.storage.objects import ObjectFolder
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.files import explained, read_bounded, reason, write_atomically, writing
from distgan.runs.folder import set_aside
from distgan.runs.lease import RENEW_SECONDS, Lease, take_lease
from distgan.runs.mirror import Mirror
from distgan.runs.status import STATUS_LIMIT, Status, read_status
from distgan.runs.stop_request import REQUEST

logger = logging.getLogger("distgan")

FOLLOW_SECONDS = 60.0
"""Seconds between two uploads of curves and samples."""
_FAILURES = "failures"
"""Folder in the store: the first failure of a job, under the number of its lease."""
_MARK = ".lease"
"""File in a local folder: token of the lease under which it was used, and whether it was rank 0's."""


class RemoteRun:
    """The run of `config.run_url`. Collective: create it on every rank, then call `open`."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        assert config.run_url is not None
        self.folder, self.runtime = config.run_folder, runtime
        self.objects = ObjectFolder(config.run_url)
        self.checkpoints = RemoteCheckpoints(self.objects)
        self.name = public_name(config.run_url)
        self.place, self.with_main = _find_place(self.folder, runtime)
        self.mirror = Mirror(self.checkpoints, self.folder, self._writable)
        self.lease: Lease | None = None
        self._keep = config.checkpoint.keep
        self._previous: str | None = None
        self._stopping, self._complained = False, False

    @contextmanager
    def taken(self, *, locked: bool) -> Iterator[None]:
        """Context manager that holds the run, and uploads its curves. Call it on rank 0 only.

        Args:
            locked: this job has locked the local folder, so rank 0 of an earlier job of this folder has ended.

        Raises:
            UserError: another job holds the run, or the store cannot be used.
        """
        with self.requests("take the run"):
            token, role = self._mark()
            # Only rank 0 renews the lease: a folder of other ranks says nothing about their job.
            gone = token if locked and role == "main" else None
            self.lease, self._previous = take_lease(self.objects, gone=gone)
            self.objects.remove([REQUEST, *(f"{_FAILURES}/{name}" for name in self.objects.names(_FAILURES))])
        try:
            # The lease is renewed until the last upload is over, however long that takes.
            with _repeated(RENEW_SECONDS, self._renew):
                try:
                    with _repeated(FOLLOW_SECONDS, self._follow):
                        yield
                finally:
                    self._follow()
        finally:
            try:
                if self.lease.lost is None:
                    self.lease.renew(released=True)
            except OSError as error:
                logger.warning("%s: the lease is not released: %s", self.name, reason(error))

    def open(self) -> None:
        """Continue in the local folders if the last job of the run did so, else clear them. Collective.

        Raises:
            UserError: a folder cannot be written, or the store cannot be read.
        """
        runtime, lease = self.runtime, self.lease
        number, token, previous = runtime.broadcast_object(
            (lease.number, lease.token, self._previous) if lease is not None else None
        )
        if lease is None:
            self.lease = Lease(self.objects, number, token)
        role = "main" if runtime.is_main else "other"
        with runtime.raise_on_all_ranks(), writing(self.folder):
            own = not self.place.leads or (previous is not None and self._mark() == (previous, role))
        known = all(runtime.gather_objects(own))
        with runtime.raise_on_all_ranks(), writing(self.folder), self.requests("read the run"):
            if not known and self.place.leads:
                self._clear()
            if runtime.is_main:
                if known:
                    self._pull()  # another node may have written the outcome
                else:
                    self.mirror.fetch()
            if self.place.leads:
                write_atomically(self.folder / _MARK, f"{token} {role}\n".encode())

    def uploads(self) -> Uploads:
        """Return this rank's uploads of checkpoints."""
        assert self.lease is not None
        folder = self.folder / "checkpoints"
        return Uploads(
            self.checkpoints, folder, self.place, keep=self._keep, writable=self._writable, follow=self._follow
        )

    def newest_step(self) -> int | None:
        """Return the step from which the run continues, or None. Call it on rank 0 only. Raises UserError."""
        with self.requests("read the checkpoints"):
            return next(iter(self.checkpoints.complete()), None)

    def fetch(self, step: int | None = None) -> tuple[Path | None, list[int]]:
        """Copy the newest valid checkpoint, or that of a step, to the local folders. Collective: call on every rank.

        Returns:
            Its path on this node, and the steps of all checkpoints. The path is None if there is none.

        Raises:
            UserError: no checkpoint is valid, or the store cannot be read.
        """
        runtime = self.runtime
        with runtime.raise_on_all_ranks(), self.requests("read the checkpoints"):
            found = self.checkpoints.complete() if runtime.is_main else {}
            there = bool(found) or (runtime.is_main and bool(self.checkpoints.listing()))
        complete, there = runtime.broadcast_object((found, there))
        for tried, checkpoint in complete.items():
            if step is not None and tried != step:
                continue
            path, damage = None, None
            with runtime.raise_on_all_ranks(), self.requests(f"fetch the checkpoint of step {tried}"):
                try:
                    if self.place.leads:
                        self.checkpoints.fetch(checkpoint, self.folder / "checkpoints")
                    path = self.folder / "checkpoints" / directory_name(tried)
                except UserError as error:
                    damage = str(error)
            damages = [text for text in runtime.gather_objects(damage) if text]
            if not damages:
                return path, sorted(complete)
            if runtime.is_main:
                logger.warning("skipped a damaged checkpoint: %s", damages[0])
        if step is not None:
            raise UserError(f"--resume: {self.name} has no valid checkpoint of step {step}", everywhere=True)
        if complete:
            raise UserError(
                f"{self.name}/checkpoints: none of the checkpoints there is valid; restore one, or set another run_dir",
                everywhere=True,
            )
        if there and runtime.is_main:
            logger.warning("%s/checkpoints: no checkpoint there is complete; starting at step 0", self.name)
        return None, []

    def own_step(self, place: str) -> int | None:
        """Return the step of a checkpoint of this run, given by its URL or its path in the local folder; else None."""
        for folder in (f"{self.objects.url}/checkpoints", str(self.folder / "checkpoints")):
            parent, _, name = place.rstrip("/").rpartition("/")
            if parent == folder:
                return step_of(name)
        return None

    def go_back(self, step: int) -> None:
        """Discard the checkpoints after a step. Call it on rank 0 only. Raises UserError."""
        with self.requests("discard later checkpoints"):
            self._writable()  # another job may have removed the checkpoint
            best, name = self.checkpoints.best(), self.checkpoints.complete()[step].name
            if best is not None and best.step > step:
                self._writable().forget_best()
            self._writable().set_latest(name)

    def push_status(self) -> None:
        """Upload status.json, from any rank. Log an error."""
        self._try("status.json", lambda: self.mirror.put("status.json"))

    def push_failure(self) -> bool:
        """Upload status.json of a failed run, from any rank, unless a rank of another node has done so before.

        In that case, replace the local status.json by the other one and return False. Log an error.
        """
        first = True

        def push() -> None:
            nonlocal first
            own = (self.folder / "status.json").read_bytes()
            found = self._created_failure(own)
            first = found == own
            if first:
                self.mirror.put("status.json")
            else:
                write_atomically(self.folder / "status.json", found)

        self._try("status.json", push)
        return first

    def pull_status(self) -> None:
        """Copy status.json to the local folder if another node has written a newer one. Log an error."""
        self._try("status.json", self._pull)

    def check_kept(self) -> None:
        """Raise UserError on all ranks if another job has taken the run over. Collective: call on every rank."""
        lost = self.runtime.broadcast_object(self.lease.lost if self.lease is not None else None)
        if lost is not None:
            raise UserError(
                f"run_dir = {self.name}: another job ({lost}) has taken the run over, because this one could not renew "
                "its lease in time; nothing to do if that job is yours",
                everywhere=True,
            )

    @contextmanager
    def requests(self, what: str) -> Iterator[None]:
        """Context manager that turns errors of the store into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"run_dir = {self.name}: cannot {what}: {reason(explained(error, self.folder))}") from None

    def _writable(self) -> RemoteCheckpoints:
        """Return the checkpoints for a write that no other job's can precede. Raises StoreError; see `Lease.check`."""
        return RemoteCheckpoints(self.lease.check()) if self.lease is not None else self.checkpoints

    def _created_failure(self, content: bytes) -> bytes:
        """Return the first failure of this job: the content, if no rank has written one before."""
        assert self.lease is not None
        name = f"{_FAILURES}/{self.lease.number:08d}.json"
        self.lease.check().create(name, content)
        # Read it in any case, because a repeated request finds the object of its first try.
        found = self.objects.read(name, STATUS_LIMIT)
        return content if found is None else found

    def _pull(self) -> None:
        content = self.objects.read("status.json", STATUS_LIMIT)
        if content is None:
            return
        try:
            found = Status.model_validate_json(content)
        except ValidationError:
            logger.warning("%s/status.json: damaged; it is written anew", self.name)
            return
        own = read_status(self.folder)
        if self.with_main and own is not None and (found.outcome == "running" or found.restarts != own.restarts):
            return
        write_atomically(self.folder / "status.json", content)

    def _try(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            if not isinstance(error, TakenError):  # then the run ends, and says so
                logger.warning("%s: %s", f"{self.name}/{what}" if what else self.name, reason(error))

    def _mark(self) -> tuple[str, str]:
        """Return the token of the lease under which the local folder was used, and the role of its first rank."""
        with suppress(UserError):
            words = read_bounded(self.folder / _MARK, 200).decode(errors="replace").split()
            if len(words) == 2:
                return words[0], words[1]
        return "", ""

    def _clear(self) -> None:
        """Remove the files of an earlier job from the local folder. Set aside checkpoints that the store lacks."""
        local = self.folder / "checkpoints"
        if self.runtime.is_main and set(steps(local)) - self.checkpoints.complete().keys():
            set_aside(self.folder, "local checkpoints that the store lacks are")
        for name in ("checkpoints", "averages", "tensorboard", "trackers", "samples"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _renew(self) -> None:
        """Renew the lease, and pass on a stop request from the store. Stop this job if another one has the run."""
        assert self.lease is not None
        try:
            self.lease.renew()
            objects = self.lease.check()
            if objects.size(REQUEST) is not None:
                self._stop()
                objects.remove([REQUEST])
            self._complained = False
        except OSError as error:
            if self.lease.lost is not None:
                if not self._stopping:
                    logger.warning("%s: %s; stopping", self.name, reason(error))
                    self._stopping = True
                    self._stop()
            elif not self._complained:
                self._complained = True
                logger.warning("%s: cannot renew the lease: %s; trying again", self.name, reason(error))

    def _stop(self) -> None:
        """Write the request that this job looks for in its local folder."""
        self._try(REQUEST, lambda: write_atomically(self.folder / REQUEST, b"by the store\n", durable=False))

    def _follow(self) -> None:
        self._try("", self.mirror.update)


@contextmanager
def _repeated(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """Context manager that calls `work` from a thread, `seconds` after it has last returned. Wait for it at the end."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _find_place(folder: Path, runtime: Runtime) -> tuple[Place, bool]:
    """Return this rank's place among those that see its local folder, and True if rank 0 is one. Collective."""
    token = runtime.broadcast_object(secrets.token_hex(8))
    own = folder / f".place-{token}-{runtime.rank}.tmp"
    with runtime.raise_on_all_ranks(), writing(folder, name="data.cache_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        own.touch()
    seen = sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob(f".place-{token}-*.tmp"))
    runtime.barrier()
    with suppress(OSError):
        own.unlink()
    return Place(seen.index(runtime.rank), len(seen)), seen[0] == 0
