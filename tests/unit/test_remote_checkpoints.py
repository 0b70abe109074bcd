"""Checkpoints in an object store: complete or not there wherever an upload ends, and kept while a store refuses."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distgan.checkpoint import downloads
from distgan.checkpoint.directory import Best, steps
from distgan.checkpoint.remote import CompleteCheckpoint, RemoteCheckpoints, TakenError
from distgan.checkpoint.uploads import Place, Uploads
from distgan.checkpoint.writer import CheckpointWriter
from distgan.data.storage.objects import ObjectFolder
from distgan.errors import UserError
from tests.checkpoints import assert_holds, assert_sets, contents, names, save, step_of


@pytest.fixture
def store() -> Iterator[dict[str, Any]]:
    """The objects of a store in memory by name."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory.store
    memory.store.clear()


@pytest.fixture
def remote(store: dict[str, Any]) -> RemoteCheckpoints:
    return RemoteCheckpoints(ObjectFolder("memory://bucket/run"))


def open_writer(
    remote: RemoteCheckpoints, folder: Path, *, keep: int = 1, writable: Callable[[], RemoteCheckpoints] | None = None
) -> CheckpointWriter:
    uploads = Uploads(remote, folder, Place(0, 1), keep=keep, writable=writable or (lambda: remote))
    return CheckpointWriter(folder, keep=keep, uploads=uploads)


def write(remote: RemoteCheckpoints, folder: Path, *numbers: int, keep: int = 1) -> CheckpointWriter:
    """Save these steps in a local folder and upload each."""
    writer = open_writer(remote, folder, keep=keep)
    for step in numbers:
        assert save(writer, step)
        writer.wait()
    return writer


def newest(remote: RemoteCheckpoints, folder: Path) -> Path:
    """What another machine resumes from."""
    return downloads._fetch(remote, folder, None, best=False)


def listed(store: dict[str, Any], name: str = "") -> list[str]:
    return sorted(key.removeprefix("/bucket/run/") for key in store if name in key)


class Killed(BaseException):
    """The process ends here: nothing catches it."""


def kill_at(patch: pytest.MonkeyPatch, point: int) -> list[str]:
    """End the process before it changes the store for the `point`-th time; list the changes until then."""
    changes: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
            if len(changes) >= point:
                raise Killed
            changes.append(f"{name} {arguments[1] if name == 'put_file' else arguments[0]}".replace("/bucket/run/", ""))
            return original(self, *arguments, **named)

        return wrapped

    for name in ("pipe_file", "put_file", "rm_file"):
        patch.setattr(MemoryFileSystem, name, wrap(name, getattr(MemoryFileSystem, name)), raising=False)
    return changes


def test_another_machine_fetches_what_was_uploaded(
    remote: RemoteCheckpoints, store: dict[str, Any], tmp_path: Path
) -> None:
    writer = write(remote, tmp_path / "a", 1, 2, 3, keep=2)
    assert remote.latest() == "step-00000003"
    assert list(remote.complete()) == [3, 2]
    assert names(tmp_path / "a") == ["latest", "step-00000003"], "what is uploaded need not stay"
    found = newest(remote, tmp_path / "b")
    assert_holds(found, 3)
    # A second time nothing is copied.
    store.clear()
    checkpoint = CompleteCheckpoint("step-00000003", (found / "manifest.json").read_bytes())
    assert remote.fetch(checkpoint, tmp_path / "b") == found
    assert writer.not_uploaded == ([], "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_before_any_change_of_the_store(
    remote: RemoteCheckpoints, store: dict[str, Any], tmp_path: Path
) -> None:
    """The upload of step 2, with step 1 in the store, which the removal of old ones then takes away."""
    write(remote, tmp_path / "first", 1)
    before, left, point = dict(store), [], 0
    while True:
        store.clear()
        store.update(before)
        with pytest.MonkeyPatch.context() as patch:
            changes = kill_at(patch, point)
            writer = open_writer(remote, tmp_path / f"{point}")
            save(writer, 2)
            writer.wait()
        found = newest(remote, tmp_path / f"{point}-other")
        assert_holds(found, step_of(found))
        left.append(step_of(found))
        # The other machine goes on, and leaves nothing of what was begun.
        write(remote, tmp_path / f"{point}-other", 3)
        assert {name.split("/")[1] for name in listed(store)} == {"latest", "step-00000003"}
        if len(changes) < point:
            break
        point += 1
    # Two sets, layout and state; then manifest, latest; then five files of step 1.
    assert len(changes) == 4 + 2 + 5
    assert changes[4].endswith("step-00000002/manifest.json")
    assert changes[5].endswith("latest")
    assert changes[6].startswith("rm_file")
    assert changes[6].endswith("step-00000001/manifest.json")
    # `latest` decides, because a checkpoint after it may be of a discarded history.
    assert left == [1] * 6 + [2] * 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_after_going_back_to_an_earlier_step(
    remote: RemoteCheckpoints, store: dict[str, Any], tmp_path: Path
) -> None:
    """Step 20 is written anew with other tensors. Neither the old one nor step 30 may come back."""
    write(remote, tmp_path / "first", 10, 20, 30, keep=3)
    remote.set_latest("step-00000010")
    before, left, point = dict(store), set(), 0
    while True:
        store.clear()
        store.update(before)
        with pytest.MonkeyPatch.context() as patch:
            changes = kill_at(patch, point)
            folder = tmp_path / f"{point}-second"
            writer = open_writer(remote, folder, keep=3)
            writer.save(20, contents(21), {"step": 21}, blocking=True)
            writer.wait()
        found = newest(remote, tmp_path / f"{point}-other")
        assert_holds(found, 21 if step_of(found) == 20 else 10)
        left.add(step_of(found))
        if len(changes) < point:
            break
        point += 1
    assert left == {10, 20}
    assert "checkpoints/step-00000020-2/" in changes[0], "what is there is not changed"
    assert {name.split("/")[1] for name in listed(store)} == {"latest", "step-00000010", "step-00000020-2"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_while_the_latest_checkpoint_is_written_again(
    remote: RemoteCheckpoints, store: dict[str, Any], tmp_path: Path
) -> None:
    """As after a rollback or a late evaluation, with another state. The store has step 7 at every moment."""
    write(remote, tmp_path / "a", 7)
    before, point, states = dict(store), 0, set()
    while True:
        store.clear()
        store.update(before)
        with pytest.MonkeyPatch.context() as patch:
            changes = kill_at(patch, point)
            writer = open_writer(remote, tmp_path / f"{point}")
            writer.save(7, contents(7), {"step": 8}, blocking=True)
            writer.wait()
        found = newest(remote, tmp_path / f"{point}-other")
        assert_sets(found, 7)
        states.add((found / "state.json").read_text())
        if len(changes) < point:
            break
        point += 1
    assert states == {'{"step": 7}', '{"step": 8}'}
    put = [change.rpartition("/")[2] for change in changes if change.startswith(("put", "pipe"))]
    assert put == ["state.json", "manifest.json", "latest"], "tensors are copied within the store"
    assert {name.split("/")[1] for name in listed(store)} == {"latest", "step-00000007-2"}


def refusing(word: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(self: Any, *arguments: Any, **named: Any) -> Any:
        if word in "".join(map(str, arguments)):
            raise PermissionError("no")
        return original(self, *arguments, **named)

    return refuse


@pytest.mark.parametrize("refuses", ["manifest", "generator", "latest"])
def test_a_store_that_refuses_for_a_while(
    remote: RemoteCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture, refuses: str
) -> None:
    """Training goes on, nothing that was saved is lost, and the next checkpoint brings all."""
    caplog.set_level(logging.WARNING, "distgan")
    writer = write(remote, tmp_path / "a", 1, keep=3)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put_file", "pipe_file"):
            patch.setattr(MemoryFileSystem, name, refusing(refuses, getattr(MemoryFileSystem, name)))
        for step in (2, 3):
            assert save(writer, step), "on the disk"
            writer.wait()
        assert not writer.upload_rest([0.0])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "the last attempt says nothing new"
    assert "memory://bucket/run: checkpoint of step 2 not uploaded: " in lines[0]
    assert "\n" not in lines[0]
    assert 3 in writer.not_uploaded[0]
    assert_holds(tmp_path / "a" / "step-00000003", 3)
    assert step_of(newest(remote, tmp_path / "b")) == 1
    assert save(writer, 4)
    assert writer.upload_rest([])
    assert sorted(remote.complete()) == [2, 3, 4]
    assert_holds(newest(remote, tmp_path / "b"), 4)
    assert steps(tmp_path / "a") == [4]


def test_an_earlier_checkpoint_that_comes_late_is_not_the_latest(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    """The store takes step 3, but step 2 with the next attempt only."""
    writer = write(remote, tmp_path / "a", 1, keep=3)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put_file", "pipe_file"):
            patch.setattr(MemoryFileSystem, name, refusing("step-00000002", getattr(MemoryFileSystem, name)))
        for step in (2, 3):
            save(writer, step)
            writer.wait()
    assert remote.latest() == "step-00000003"
    assert writer.not_uploaded[0] == [2]
    assert writer.upload_rest([0.0])
    assert list(remote.complete()) == [3, 2, 1]
    assert remote.latest() == "step-00000003"


@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_that_blocks_does_not_wait_for_an_upload(
    remote: RemoteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    begun, over, put = threading.Event(), threading.Event(), MemoryFileSystem.put_file
    put_files: list[str] = []

    def slow(self: Any, path: str, *arguments: Any, **named: Any) -> None:
        put_files.append(path)
        begun.set()
        assert over.wait(60)
        put(self, path, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    writer = open_writer(remote, tmp_path / "a")
    assert writer.save(1, contents(1), {"step": 1})
    assert begun.wait(60)
    assert writer.save(2, contents(2), {"step": 2}, blocking=True, last=last), "while step 1 is being uploaded"
    assert not over.is_set()
    assert_holds(tmp_path / "a" / "step-00000001", 1)
    assert remote.complete() == {}
    over.set()
    assert writer.upload_rest([0.0])
    assert remote.latest() == "step-00000002"
    assert_holds(newest(remote, tmp_path / "b"), 2)
    files = len(list((tmp_path / "b" / "step-00000002").iterdir())) - 1  # the manifest is no upload
    uploaded = [int(Path(path).parent.name.removeprefix("step-")) for path in put_files]
    assert uploaded == ([1] + [2] * files + [1] * (files - 1) if last else [1] * files + [2] * files)
    assert steps(tmp_path / "a") == [2]


def test_what_was_not_uploaded_is_by_the_next_start(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    save(CheckpointWriter(tmp_path / "a", keep=2), 5)
    (tmp_path / "a" / "step-00000003").mkdir()  # of another number of nodes: its files are lost
    writer = open_writer(remote, tmp_path / "a")
    assert writer.uploads is not None
    writer.uploads.settle(writer._background)
    assert steps(tmp_path / "a") == [5]
    assert writer.upload_rest([0.0])
    assert step_of(newest(remote, tmp_path / "b")) == 5


def test_a_job_that_has_lost_the_run_changes_nothing(
    remote: RemoteCheckpoints, store: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(remote, tmp_path / "a", 1)
    before = listed(store)

    def lost() -> RemoteCheckpoints:
        raise TakenError("another job has taken the run over")

    writer = open_writer(remote, tmp_path / "b", writable=lost)
    assert save(writer, 2)
    assert not writer.upload_rest([0.0])
    assert listed(store) == before
    assert writer.not_uploaded == ([2], "another job has taken the run over")
    assert "not uploaded" not in caplog.text, "the error at the end says why"


def test_the_best_checkpoint_stays(remote: RemoteCheckpoints, store: dict[str, Any], tmp_path: Path) -> None:
    writer = write(remote, tmp_path / "a", 1)
    assert writer.mark_best(1, 3.0, "fid")
    write(remote, tmp_path / "a", 2, 3)
    assert sorted(remote.complete()) == [1, 3]
    assert not remote.mark_best(Best(step=2, metric="fid", value=1.0).model_dump_json().encode()), "it is not there"
    assert remote.mark_best((tmp_path / "a" / "best.json").read_bytes())
    assert step_of(downloads._fetch(remote, tmp_path / "b", None, best=True)) == 1
    # Another machine, whose local folder has no mark, keeps it too.
    write(remote, tmp_path / "c", 4)
    assert sorted(remote.complete()) == [1, 4]


def test_a_damaged_one_is_left(remote: RemoteCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(remote, tmp_path / "a", 1, 2, 3, keep=3)
    flipped = remote.objects.location("checkpoints/step-00000003/generator.1-of-1.safetensors")
    content = bytearray(fsspec.filesystem("memory").cat_file(flipped))
    content[-1] ^= 1
    fsspec.filesystem("memory").pipe_file(flipped, bytes(content))
    remote.objects.write("checkpoints/step-00000002/counters.1-of-1.safetensors", b"longer" * 100)
    for _ in range(3):
        assert list(remote.complete()) == [3, 1], "sizes differ"
    assert caplog.text.count("step-00000002: its files do not have the sizes") == 1
    assert step_of(newest(remote, tmp_path / "b")) == 1
    # One of the same step that was written again and is damaged does not take the place of the one before.
    remote.objects.copy("checkpoints/step-00000001/manifest.json", "checkpoints/step-00000001-2/manifest.json")
    remote.prune(3, 3, [])
    assert list(remote.complete()) == [3, 1]
    assert set(remote.listing()) == {"step-00000001", "step-00000003"}
    assert "step-00000003/generator.1-of-1.safetensors: damaged" in caplog.text
    assert names(tmp_path / "b") == ["latest", "step-00000001"]


@pytest.mark.parametrize("name", ["../../escaped", "/etc/escaped", "a/b", ".hidden", "..", ""])
def test_no_name_leads_out(remote: RemoteCheckpoints, store: dict[str, Any], tmp_path: Path, name: str) -> None:
    write(remote, tmp_path / "a", 1)
    manifest = json.loads(remote.manifest("step-00000001") or b"")
    manifest["files"][name] = {"bytes": 3, "sha256": hashlib.sha256(b"bad").hexdigest()}
    remote.objects.write("checkpoints/step-00000001/manifest.json", json.dumps(manifest).encode())
    for key in ("checkpoints/step-00000001/" + name, "checkpoints/step-1/x", "checkpoints/../x"):
        store[f"/bucket/run/{key}"] = store["/bucket/run/checkpoints/latest"]
    assert remote.complete() == {}
    with pytest.raises(UserError, match="no valid checkpoint"):
        newest(remote, tmp_path / "b")
    assert list(remote.listing()) == ["step-00000001"]
