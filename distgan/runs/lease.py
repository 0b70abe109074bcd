"""One job holds a run in an object store, by an object `lease/NUMBER.json` that it renews.

The job that has written the highest number holds the run. A job takes a free run by creating the next number, which a
store with conditional writes allows to one job only. The lease of a killed job is taken over when it has not changed
for `LEASE_SECONDS` of the clock of the job that takes it, so that clocks of different hosts do not matter.

What is guaranteed: in a store with conditional writes, two jobs never take the same number. A job looks for higher
numbers before it writes a manifest, `latest` or a removal, and stops when there is one. It also writes nothing once
`_HELD` of the lease have passed since it last began to renew it, until it has renewed it again; requests that are under
way then are canceled. A request that the store has received but not answered can still take effect. Without
conditional writes, a job reads its lease back after `_SETTLE_SECONDS`; if a request of another job took longer than
that, both hold the run until the first one's next look, which stops it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import time
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distgan.checkpoint.remote import TakenError
from distgan.data.storage.locations import public_name
from distgan.data.storage.objects import ObjectFolder
from distgan.data.storage.store_errors import StoreError
from distgan.errors import UserError, printable
from distgan.runs.status import now

logger = logging.getLogger("distgan")

LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
"""Seconds between two renewals, and between two looks for a stop request."""
_POLL_SECONDS = 2.0
_SETTLE_SECONDS = 5.0
_HELD = 0.75
"""Fraction of `LEASE_SECONDS` for which a job may write after a renewal."""
_TRY = 0.25
"""Fraction of `LEASE_SECONDS` after which a look or a renewal is given up, so that the next one comes in time."""
_NUMBER = re.compile(r"(\d{8})\.json")
_LIMIT = 4096


class LeaseRecord(BaseModel):
    """Content of a lease, validated because its source is untrusted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    token: Annotated[str, Field(max_length=100)]
    """Random name of the job's attempt."""
    host: Annotated[str, Field(max_length=300)]
    pid: int
    renewals: int
    released: bool
    """True if the job has ended by itself."""
    time: Annotated[str, Field(max_length=100)]
    """Time of the last renewal: ISO 8601, UTC."""


class FoundLease(NamedTuple):
    """The lease with the highest number, as it is in the store."""

    number: int
    content: bytes
    record: LeaseRecord | None
    """None if it is damaged."""

    @property
    def holder(self) -> str:
        """Return the process and host for messages."""
        known = self.record
        return f"process {known.pid} on {printable(known.host)}" if known else "an unknown process"


def newest_lease(objects: ObjectFolder) -> FoundLease | None:
    """Return the lease with the highest number; None if no job has ever held the run. Raises StoreError."""
    number = max(_numbers(objects), default=None)
    content = None if number is None else objects.read(_name(number), _LIMIT)
    if number is None or content is None:
        return None
    try:
        return FoundLease(number, content, LeaseRecord.model_validate_json(content))
    except ValidationError:
        return FoundLease(number, content, None)


class Lease:
    """The lease that this job holds, or one of another rank of this job. Methods raise StoreError."""

    def __init__(self, objects: ObjectFolder, number: int, token: str) -> None:
        self.objects, self.number, self.token = objects, number, token
        self.lost: str | None = None
        """The job that has taken the run over, in words, once this one has noticed."""
        self._renewals = 0
        self._renewed: float | None = None
        """Time at which the last successful renewal began; None on a rank that does not renew the lease."""

    def check(self) -> ObjectFolder:
        """Return the objects of the run, for writes that end before another job may take the run over.

        Raises TakenError, and StoreError if this job has not renewed its lease for too long.
        """
        self._look(self.objects.within(_TRY * LEASE_SECONDS))
        if self._renewed is None:  # rank 0 knows how much time is left
            return self.objects.within(_TRY * LEASE_SECONDS)
        passed = time.monotonic() - self._renewed
        if passed > _HELD * LEASE_SECONDS:
            raise StoreError(
                f"the lease of this job could not be renewed for {passed:.0f} s; nothing is written until it is"
            )
        return self.objects.within(_HELD * LEASE_SECONDS - passed)

    def renew(self, *, released: bool = False) -> None:
        """Write the lease anew, or give up soon. Call it on the rank that has taken it only."""
        objects = self.objects.within(_TRY * LEASE_SECONDS)
        self._look(objects)
        self._renewals += 1
        began = time.monotonic()
        objects.write(_name(self.number), self._content(released))
        self._renewed = began

    def _look(self, objects: ObjectFolder) -> None:
        """Raise TakenError if another job has taken the run over."""
        if self.lost is None and self._is_taken(objects):
            found = newest_lease(objects)
            self.lost = found.holder if found else "an unknown process"
        if self.lost is not None:
            raise TakenError(f"another job has taken the run over ({self.lost})")

    def _is_taken(self, objects: ObjectFolder) -> bool:
        if max(_numbers(objects), default=self.number) > self.number:
            return True
        # A store that ignores the condition of a conditional write lets another job replace this lease.
        content = objects.read(_name(self.number), _LIMIT)
        return content is not None and self.token.encode() not in content

    def _content(self, released: bool = False) -> bytes:
        record = LeaseRecord(
            token=self.token, host=socket.gethostname(), pid=os.getpid(), renewals=self._renewals, released=released,
            time=now(),
        )  # fmt: skip
        return json.dumps(record.model_dump()).encode()

    def _create(self) -> bool:
        """Return True if this job has created the lease, and no other has a higher one."""
        content = self._content()
        self._renewed = time.monotonic()
        self.objects.create(_name(self.number), content)
        if not self.objects.try_exclusive(f"lease/probe-{self.token}"):
            time.sleep(_SETTLE_SECONDS)
        # Read back, also because a repeated request finds the object of the first one.
        if self.objects.read(_name(self.number), _LIMIT) != content:
            return False
        # This number may have been free only because its successor's job has removed the old leases.
        if self._is_taken(self.objects):
            self.objects.remove([_name(self.number)])
            return False
        return True


def take_lease(objects: ObjectFolder, *, gone: str | None) -> tuple[Lease, str | None]:
    """Take a run, if no other job holds it. Wait up to `LEASE_SECONDS` to see if a lease is renewed.

    Args:
        gone: token of a job that is known to have ended.

    Returns:
        The lease, and the token of the last one before it.

    Raises:
        UserError: another job holds the run.
        StoreError: a request failed.
    """
    last = newest_lease(objects)
    if last is not None and last.record is not None and last.record.token == gone:
        pass
    elif last is not None and not (last.record and last.record.released):
        last = _watch(objects, last)
    lease = Lease(objects, last.number + 1 if last else 1, secrets.token_hex(16))
    if not lease._create():
        raise _held(objects, newest_lease(objects) or last)
    objects.remove(_name(number) for number in sorted(_numbers(objects)) if number < lease.number)
    return lease, last.record.token if last and last.record else None


def _watch(objects: ObjectFolder, last: FoundLease) -> FoundLease:
    """Return a lease that has ended. Raises UserError if it is renewed."""
    logger.info(
        "%s: held by %s; waiting up to %.0f s to see if that job still runs",
        public_name(objects.url), last.holder, LEASE_SECONDS,
    )  # fmt: skip
    deadline = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        found = newest_lease(objects)
        if found is not None and found.content != last.content:
            if found.record is None or not found.record.released:
                raise _held(objects, found)
            return found
    return last


def _held(objects: ObjectFolder, found: FoundLease | None) -> UserError:
    who = f" ({found.holder})" if found else ""
    return UserError(
        f"run_dir = {public_name(objects.url)}: another job is training there{who}; wait for it, or set another run_dir"
    )


def _numbers(objects: ObjectFolder) -> list[int]:
    return [int(match[1]) for match in map(_NUMBER.fullmatch, objects.names("lease")) if match]


def _name(number: int) -> str:
    return f"lease/{number:08d}.json"
