"""Status of a run in an object store, and requests to stop it, from any machine."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime

from pydantic import ValidationError

from distgan.checkpoint.remote import RemoteCheckpoints
from distgan.data.storage.locations import public_name
from distgan.data.storage.objects import ObjectFolder
from distgan.data.storage.store_errors import StoreError
from distgan.errors import NoAnswerError, UserError
from distgan.files import reason
from distgan.runs.lease import LEASE_SECONDS, newest_lease
from distgan.runs.status import STATUS_LIMIT, RunStatus, Status, describe, now
from distgan.runs.stop_request import REQUEST


def remote_standing(url: str, launch: str | None = None, *, begun: bool = False) -> RunStatus:
    """Return the status of a run or, if `launch` is given, of that launch of it.

    It is `killed` if the lease of a running job is older than `LEASE_SECONDS` by this machine's clock.

    Args:
        begun: refuse a folder that holds no run. Otherwise the run of a config may not have begun.

    Raises:
        NoAnswerError: the store cannot be read.
        UserError: there is no run or no bucket, the store refuses the credentials, or status.json is damaged.
    """
    objects = ObjectFolder(url)
    try:
        status = _read(objects)
        killed = status is not None and status.outcome == "running" and _has_ended(objects)
        if killed:
            again = _read(objects)
            killed, status = killed and again == status, again
        newest = next(iter(RemoteCheckpoints(objects).complete()), -1)
    except OSError as error:
        # Trying again does not help against a missing bucket or wrong credentials.
        kind = UserError if isinstance(error, StoreError) and error.permanent else NoAnswerError
        raise kind(f"{public_name(url)}: cannot read the run: {reason(error)}") from None
    if begun and status is None and newest == -1:
        raise UserError(
            f"{public_name(url)}: not a run (no status.json in it); pass the run_dir of a run, or its config"
        )
    return describe(status, newest, launch, killed=killed)


def request_remote_stop(url: str) -> None:
    """Ask a running job to save and exit. It looks for the request when it renews its lease.

    Raises:
        UserError: no job runs there, or the store refuses.
    """
    objects = ObjectFolder(url)
    try:
        status = _read(objects)
        if status is None:
            raise UserError(f"{public_name(url)}: no status.json in it; pass the run_dir of a run")
        if status.outcome != "running":
            raise UserError(f"{public_name(url)}: nothing to stop: the run is {status.outcome} since {status.time}")
        if _has_ended(objects):
            raise UserError(f"{public_name(url)}: nothing to stop: its job on {status.host} no longer renews its lease")
        objects.write(REQUEST, f"{now()} by process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise UserError(f"{public_name(url)}: cannot ask the run to stop: {reason(error)}") from None


def _read(objects: ObjectFolder) -> Status | None:
    content = objects.read("status.json", STATUS_LIMIT)
    if content is None:
        return None
    try:
        return Status.model_validate_json(content)
    except ValidationError as error:
        where = public_name(objects.location("status.json"))
        raise UserError(f"{where}: damaged: {error.errors(include_url=False)[0]['msg']}; remove it") from None


def _has_ended(objects: ObjectFolder) -> bool:
    """Return True if no job holds the run any more."""
    found = newest_lease(objects)
    if found is None or found.record is None or found.record.released:
        return True
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(found.record.time)
    except (ValueError, TypeError):
        return False
    return age.total_seconds() > LEASE_SECONDS
