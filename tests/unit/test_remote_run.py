"""A node's copy of a run in an object store: what it keeps, fetches and sets aside when jobs take turns."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from distgan.checkpoint.directory import Best, write_best
from distgan.checkpoint.remote import RemoteCheckpoints
from distgan.checkpoint.writer import CheckpointWriter
from distgan.data.storage.objects import ObjectFolder
from distgan.data.storage.store_errors import StoreError
from distgan.distributed.control import Control
from distgan.doctor.storage import object_store
from distgan.errors import UserError
from distgan.runs import lease, remote
from distgan.runs.remote import RemoteRun
from distgan.runs.status import exhausted_micro_batches, read_status, write_failure, write_status
from distgan.training import divergence
from tests.checkpoints import names, save

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lease, "_watch", lambda objects, last: last)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield
    memory.store.clear()


def run_in(folder: Path) -> RemoteRun:
    config: Any = SimpleNamespace(run_url=URL, run_folder=folder, checkpoint=SimpleNamespace(keep=3))
    runtime: Any = Control(None)
    return RemoteRun(config, runtime)


def start(folder: Path, held: ExitStack, *, locked: bool = True) -> RemoteRun:
    """A job of one rank that has taken the run and opened its folder."""
    run = run_in(folder)
    held.enter_context(run.taken(locked=locked))
    run.open()
    return run


def write_row(folder: Path, step: int) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def test_a_machine_keeps_its_files_until_another_one_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    killed = []  # jobs that never leave their context, while they are referenced
    with ExitStack() as held:
        run = start(a, held)
        write_row(a, 1)
        writer = CheckpointWriter(a / "checkpoints", keep=3, uploads=run.uploads())
        save(writer, 1)
        assert writer.upload_rest([])
        # What follows is not uploaded: the machine is killed.
        save(CheckpointWriter(a / "checkpoints", keep=3), 2)
        killed.append(held.pop_all())
    write_row(a, 2)
    with ExitStack() as held:
        run = start(a, held)
        assert names(a / "checkpoints") == ["latest", "step-00000001", "step-00000002"], "its own last job"
        assert (a / "metrics.jsonl").read_text().count("\n") == 2
        killed.append(held.pop_all())
    with ExitStack() as held:
        run = start(b, held, locked=False)
        assert (b / "metrics.jsonl").read_text() == '{"step": 1}\n', "as of the checkpoint in the store"
        path, there = run.fetch()
        assert (path, there) == (b / "checkpoints" / "step-00000001", [1])
    with ExitStack() as held:
        caplog.set_level("INFO", "distgan")
        start(a, held)
        assert f"local checkpoints that the store lacks are now in {a / 'previous-1'}" in caplog.text
        assert "step 0" not in caplog.text
        assert names(a / "previous-1" / "checkpoints") == ["latest", "step-00000001", "step-00000002"]
        assert not (a / "checkpoints").exists()
        assert (a / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_only_the_folder_of_rank_0_tells_that_its_job_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job runs with rank 0 in folder a and another rank in folder b, and another one starts with rank 0 in b."""

    def watch(objects: ObjectFolder, last: lease.FoundLease) -> lease.FoundLease:
        raise UserError("watched")

    monkeypatch.setattr(lease, "_watch", watch)
    with ExitStack() as held:
        first = start(tmp_path / "a", held)
        assert first.lease is not None
        (tmp_path / "b" / "checkpoints").mkdir(parents=True)
        (tmp_path / "b" / ".lease").write_text(f"{first.lease.token} other\n")
        with pytest.raises(UserError, match="watched"):
            start(tmp_path / "b", held)
        assert (tmp_path / "b" / "checkpoints").exists()
        first.lease.check()
        # The lock of its own folder is free only if the job has ended; without locks nothing is known.
        with pytest.raises(UserError, match="watched"):
            start(tmp_path / "a", held, locked=False)
        start(tmp_path / "a", held)


def test_a_stop_request_in_the_store_reaches_the_local_folder(tmp_path: Path) -> None:
    ObjectFolder(URL).write("stop.request", b"before the job began")
    with ExitStack() as held:
        run = start(tmp_path / "a", held)
        run._renew()
        assert not (tmp_path / "a" / "stop.request").exists()
        run.objects.write("stop.request", b"now")
        run._renew()
        assert (tmp_path / "a" / "stop.request").exists()
        assert run.objects.size("stop.request") is None


def test_a_job_whose_run_is_taken_stops_and_writes_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as held:
        first = start(tmp_path / "a", held)
        write_status(tmp_path / "a", "running")
        first.push_status()
        second = start(tmp_path / "b", held)
        before = first.objects.names()
        first.check_kept()
        first._renew()
        assert (tmp_path / "a" / "stop.request").exists()
        with pytest.raises(UserError, match=r"another job \(process \d+ on .*\) has taken the run over") as caught:
            first.check_kept()
        assert caught.value.everywhere
        write_status(tmp_path / "a", "preempted")
        write_row(tmp_path / "a", 1)
        first.push_status()
        first._follow()
        first._renew()
        assert first.objects.names() == before
        second.check_kept()
        with pytest.raises(UserError, match="cannot discard later checkpoints: another job"):
            first.go_back(1)
    assert caplog.text.count("another job") == 1, "the error at the end says it again"
    assert "is not released" not in caplog.text


def test_the_first_failure_counts_on_whichever_node_it_is(tmp_path: Path) -> None:
    """Rank 1 fails on another node; then rank 0 notices that it has lost rank 1."""
    with ExitStack() as held:
        main = start(tmp_path / "a", held)
        write_status(tmp_path / "a", "running", world_size=2)
        main.push_status()
        other = run_in(tmp_path / "b")
        other.with_main, other.lease = False, main.lease
        # Each looks before the other has written.
        for run in (other, main):
            run.pull_status()
        for run, failure in ((other, "no memory"), (main, "lost contact with another rank")):
            assert write_failure(run.folder, 1, failure, lost_rank=run is main)
            assert run.push_failure() == (run is other)
        assert other.push_failure(), "its own, as a repeated request finds it"
    for place in (tmp_path / "a", tmp_path / "b"):
        status = read_status(place)
        assert status is not None
        assert (status.outcome, status.reason, status.world_size) == ("failed", "rank 1: no memory", 2)
    stored = ObjectFolder(URL).read("status.json", 10_000)
    assert stored == (tmp_path / "a" / "status.json").read_bytes()
    with ExitStack() as held:
        start(tmp_path / "a", held)
        assert ObjectFolder(URL).names("failures") == {}


def test_a_restart_knows_the_failure_that_another_node_wrote(tmp_path: Path) -> None:
    with ExitStack() as held:
        main = start(tmp_path / "a", held)
        write_status(tmp_path / "a", "running", world_size=2)
        main.push_status()
        other = run_in(tmp_path / "b")
        other.with_main, other.lease = False, main.lease
        other.pull_status()
        # Rank 0 is killed when another rank's memory runs out.
        write_failure(tmp_path / "b", 1, "no memory", exhausted={"micro_batches": 2})
        other.push_failure()
        with ExitStack() as again:
            start(tmp_path / "a", again)
            assert exhausted_micro_batches(tmp_path / "a") == {"micro_batches": 2}


def test_the_lease_is_renewed_during_the_last_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RENEW_SECONDS", 0.01)
    renewed, uploads = threading.Event(), []

    def follow() -> None:
        renewed.clear()
        uploads.append(renewed.wait(10))

    with ExitStack() as held:
        run = run_in(tmp_path / "a")
        monkeypatch.setattr(run, "_renew", renewed.set)
        monkeypatch.setattr(run, "_follow", follow)
        held.enter_context(run.taken(locked=True))
    assert uploads == [True]


def test_only_files_of_a_run_are_fetched(tmp_path: Path) -> None:
    objects = ObjectFolder(URL)
    kept = [
        "tensorboard/events.out.tfevents.1.host.2.0",
        "trackers/wandb.json",
        "metrics.jsonl",
        "checkpoints/best.json",
    ]
    for name in (*kept, "tensorboard/x.py", "tensorboard/a/events.out.tfevents.1", "trackers/.x.json", "config.yaml"):
        objects.write(name, b"{}")
    with ExitStack() as held:
        start(tmp_path / "a", held)
        files = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert files == {*kept, ".lease"}


def test_going_back_discards_later_checkpoints_and_their_best(tmp_path: Path) -> None:
    with ExitStack() as held:
        run = start(tmp_path / "a", held)
        writer = CheckpointWriter(tmp_path / "a" / "checkpoints", keep=3, uploads=run.uploads())
        for step in (1, 2, 3):
            save(writer, step)
            writer.wait()
        writer.mark_best(3, 1.0, "fid")
        run._follow()
        assert run.checkpoints.best() is not None
        assert run.own_step(f"{URL}/checkpoints/step-00000001") == 1
        assert run.own_step(str(tmp_path / "a" / "checkpoints" / "step-00000001")) == 1
        assert run.own_step("s3://other/checkpoints/step-00000001") is None
        run.go_back(1)
        assert list(run.checkpoints.complete()) == [1, 3, 2]
        assert run.checkpoints.best() is None


def test_a_store_that_does_not_answer_does_not_decide_on_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "_PAUSES", (0.0, 0.0))
    folder = tmp_path / "a" / "checkpoints"
    complete, failures = RemoteCheckpoints.complete, [1]

    def answer(self: RemoteCheckpoints) -> Any:
        if failures and failures.pop() > 0:
            raise StoreError("503")
        return complete(self)

    with ExitStack() as held:
        run = start(tmp_path / "a", held)
        writer = CheckpointWriter(folder, keep=3, uploads=run.uploads())
        save(writer, 1)
        assert writer.upload_rest([])
        writer.mark_best(1, 1.0, "fid")
        monkeypatch.setattr(RemoteCheckpoints, "complete", answer)
        assert divergence._best_checkpoint(folder, writer).step == 1, "the second request succeeds"
        failures.extend([1, 1])
        with pytest.raises(UserError, match=r"training\.on_divergence needs the store: cannot read .*503"):
            divergence._best_checkpoint(folder, writer)
        # An upload that is late.
        failures.clear()
        write_best(folder, Best(step=2, metric="fid", value=0.5))
        assert writer.uploads is not None
        writer.uploads.done = False
        with pytest.raises(UserError, match="the best checkpoint, of step 2, is not uploaded"):
            divergence._best_checkpoint(folder, writer)
        writer.uploads.done = True
        assert divergence._best_checkpoint(folder, writer).missing == "the store does not have the best checkpoint"


def test_the_doctor_tries_the_store() -> None:
    (finding,) = object_store(URL, ".probe")
    assert finding.verdict == "ok"
    assert ObjectFolder(URL).names() == {}
    (finding,) = object_store("s3a-none://bucket/run", ".probe")
    assert finding.verdict == "FAILED"


def test_averages_are_removed_by_the_job_that_holds_the_run(tmp_path: Path) -> None:
    """Those of the images that it trains again. A job that has lost the run leaves them to the other."""
    with ExitStack() as held:
        first = start(tmp_path / "first", held)
        for images in (8, 16, 24):
            first.objects.write(f"averages/snapshot-{images:012d}.safetensors", b"x")
        first.mirror.forget_later_averages(16)
        left = [f"snapshot-{images:012d}.safetensors" for images in (8, 16)]
        assert sorted(first.objects.names("averages")) == left
        start(tmp_path / "second", held, locked=False)
        with pytest.raises(StoreError, match="another job has taken the run over"):
            first.mirror.forget_later_averages(8)
        assert sorted(first.objects.names("averages")) == left
