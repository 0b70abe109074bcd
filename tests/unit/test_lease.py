"""One job holds a run in an object store: by a number that only one can create, renewed until the job ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distgan.data.storage.objects import ObjectFolder
from distgan.data.storage.store_errors import StoreError, explain
from distgan.errors import NoAnswerError, UserError
from distgan.runs import lease
from distgan.runs.lease import RENEW_SECONDS, Lease, newest_lease, take_lease
from distgan.runs.remote_status import remote_standing, request_remote_stop
from distgan.runs.status import write_status


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectFolder]:
    """The objects of a run in memory, with leases of a fifth of a second."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.2)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield ObjectFolder("memory://bucket/run")
    memory.store.clear()


def take(objects: ObjectFolder, gone: str | None = None) -> Lease:
    return take_lease(objects, gone=gone)[0]


def _answer(status: int, code: str) -> Exception:
    """An error of botocore."""
    error = Exception(code)
    error.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}  # type: ignore[attr-defined]
    return error


def test_a_run_that_is_held_is_refused_in_one_line(objects: ObjectFolder) -> None:
    first, over = take(objects), threading.Event()

    def renew() -> None:
        while not over.wait(0.05):
            first.renew()

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError) as caught:
            take(objects)
    finally:
        over.set()
        thread.join()
    first.renew()
    said = str(caught.value)
    assert said.startswith("run_dir = memory://bucket/run: another job is training there (process ")
    assert "\n" not in said


def test_the_lease_of_a_killed_job_is_taken_over(objects: ObjectFolder) -> None:
    first = take(objects)
    second, previous = take_lease(objects, gone=None)
    assert (first.number, second.number, previous) == (1, 2, first.token)
    assert objects.names("lease").keys() == {"00000002.json"}
    with pytest.raises(StoreError, match="another job has taken the run over"):
        first.renew()
    assert first.lost is not None
    second.renew()


def test_a_job_that_could_not_renew_stops_writing_before_another_may_take_over(
    objects: ObjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    holder, clock = take(objects), [time.monotonic()]
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    holder.renew()

    def refuse(*_: object) -> None:
        clock[0] += 15.0
        raise StoreError("503")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectFolder, "write", refuse)
        for _ in range(2):
            holder.check()
            with pytest.raises(StoreError, match="503"):
                holder.renew()
        clock[0] += 14.0
        left = holder.check()._until
        assert left is not None
        assert left - time.monotonic() <= 1.0, "what is under way ends in time too"
        clock[0] += 2.0
        with pytest.raises(StoreError, match="the lease of this job could not be renewed for 46 s"):
            holder.check()
    assert clock[0] - holder._renewed < lease.LEASE_SECONDS
    # The store is back, and nobody has taken the run.
    holder.renew()
    holder.check()
    # A store that hangs in one renewal is asked again in time.
    assert RENEW_SECONDS + lease._TRY * 60 + RENEW_SECONDS < lease._HELD * 60


def test_nobody_waits_for_a_job_that_has_ended(objects: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(lease, "_watch", wait)
    first = take(objects)
    first.renew(released=True)
    second = take(objects)
    # This machine has locked the folder that the second one worked in, so it is gone.
    assert take(objects, gone=second.token).number == 3
    with pytest.raises(AssertionError):
        take(objects, gone=second.token)


def test_one_of_several_takes_over(objects: ObjectFolder) -> None:
    take(objects)
    results: list[Any] = []

    def contend() -> None:
        try:
            results.append(take(objects))
        except UserError as error:
            results.append(str(error))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [result for result in results if isinstance(result, Lease)]
    assert len(taken) == 1
    assert len(results) == 8
    assert all("another job is training there" in result for result in results if isinstance(result, str))


def test_a_number_that_is_free_again_is_not_taken(objects: ObjectFolder) -> None:
    """A slow job saw lease 1 expire. Meanwhile others took 2 and 3, and removed 2."""
    for _ in range(3):
        take(objects).renew(released=True)
    slow = Lease(objects, 2, "slow")
    assert not slow._create()
    assert objects.names("lease").keys() == {"00000003.json"}


def _race(one: Lease, other: Lease) -> Lease:
    """Create both leases at once, and return the one that holds the run."""
    results: dict[str, bool] = {}
    threads = [
        threading.Thread(target=lambda of=of: results.update({of.token: of._create()}))  # type: ignore[misc]
        for of in (one, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results.values()) == [False, True]
    return one if results[one.token] else other


def test_without_conditional_writes_the_last_writer_holds_the_run(
    objects: ObjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectFolder, "creates_exclusively", False)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    one, other = Lease(objects, 1, "one"), Lease(objects, 1, "other")
    monkeypatch.setattr(objects, "size", lambda name: None)  # both have looked before the other wrote
    holder = _race(one, other)
    # One that wrote later still is noticed by the first at its next look.
    objects.write("lease/00000001.json", Lease(objects, 1, "late")._content())
    with pytest.raises(StoreError, match="another job"):
        holder.check()


def test_a_store_that_ignores_the_condition_of_a_write(objects: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client accepts mode="create", and the store replaces what is there."""
    original = MemoryFileSystem.pipe_file

    def replace(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        original(self, path, value, mode="overwrite")

    assert objects.try_exclusive("probe")
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", replace)
    assert objects.creates_exclusively
    assert not objects.try_exclusive("probe")
    assert objects.names() == {}
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    one, other = Lease(objects, 1, "one"), Lease(objects, 1, "other")
    holder = _race(one, other)
    holder.check()
    objects.create("lease/00000001.json", Lease(objects, 1, "late")._content())
    with pytest.raises(StoreError, match="another job"):
        holder.check()


@pytest.mark.parametrize("content", [b"{", b'{"token": 1}', b"\xff" * 100])
def test_a_damaged_lease_is_watched_like_any_other(objects: ObjectFolder, content: bytes) -> None:
    objects.write("lease/00000004.json", content)
    objects.write("lease/9.json", b"of others")
    assert take(objects).number == 5
    assert objects.names("lease").keys() == {"00000005.json", "9.json"}


def test_a_lease_that_is_too_large_is_not_read(objects: ObjectFolder) -> None:
    objects.write("lease/00000004.json", b"{" * 10_000)
    with pytest.raises(StoreError, match="larger than 4096 bytes"):
        newest_lease(objects)


def test_status_and_stop_of_a_run_in_a_store(objects: ObjectFolder, tmp_path: Path) -> None:
    """As a machine sees them that has nothing of the run."""
    url = objects.url

    def write(outcome: Any, **values: Any) -> None:
        write_status(tmp_path, outcome, **values)
        objects.write("status.json", (tmp_path / "status.json").read_bytes())

    assert str(remote_standing(url)) == "none -1"
    with pytest.raises(UserError, match=r"no status\.json in it"):
        request_remote_stop(url)
    holder = take(objects)
    write("running", world_size=2)
    assert str(remote_standing(url)) == "running -1"
    assert str(remote_standing(url, "other")) == "unstarted -1"
    request_remote_stop(url)
    assert objects.size("stop.request")
    holder.renew(released=True)
    assert str(remote_standing(url)) == "killed -1"
    with pytest.raises(UserError, match=r"nothing to stop: its job on .* no longer renews its lease"):
        request_remote_stop(url)
    write("failed", reason="rank 0: out of memory")
    assert str(remote_standing(url)) == "failed -1 rank 0: out of memory"
    with pytest.raises(UserError, match="nothing to stop: the run is failed since"):
        request_remote_stop(url)
    objects.write("status.json", b"[]")
    with pytest.raises(UserError, match=r"memory://bucket/run/status\.json: damaged"):
        remote_standing(url)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (_answer(503, "SlowDown"), True),
        (_answer(429, "TooManyRequests"), True),
        (TimeoutError(), True),
        (ConnectionRefusedError(), True),
        (_answer(403, "InvalidAccessKeyId"), False),
        (_answer(400, "ExpiredToken"), False),
        (_answer(301, "PermanentRedirect"), False),
        (_answer(404, "NoSuchBucket"), False),
        (type("NoCredentialsError", (Exception,), {})(), False),
        (type("ParamValidationError", (Exception,), {})(), False),
        (ValueError("Invalid endpoint: nohost"), False),
    ],
)
def test_scripts_ask_again_only_if_that_can_help(
    objects: ObjectFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, again: bool
) -> None:
    """They do after a NoAnswerError, by its exit code."""

    def fail(*_: object) -> None:
        raise explain("s3://bucket/run", error)

    monkeypatch.setattr(ObjectFolder, "read", fail)
    with pytest.raises(UserError) as caught:
        remote_standing(objects.url)
    assert isinstance(caught.value, NoAnswerError) == again
    assert "\n" not in str(caught.value)
    assert ("AWS_DEFAULT_REGION" in str(caught.value)) == ("Redirect" in str(error))
