"""Checkpoints that ranks without a common folder upload: kill -9 of a rank at any point leaves a valid newest one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch.distributed as dist

from distgan.checkpoint import downloads
from distgan.checkpoint.remote import RemoteCheckpoints
from distgan.checkpoint.uploads import Place, Uploads
from distgan.checkpoint.writer import CheckpointWriter
from distgan.data.storage import filesystem
from distgan.data.storage.objects import ObjectFolder
from distgan.distributed.control import Control
from distgan.runs.folder import set_aside_later
from distgan.runs.remote import RemoteRun
from distgan.training.resume import _where_to_resume_remote
from tests.checkpoints import assert_holds, save, step_of
from tests.ranks import Processes


def use_local_store(patch: pytest.MonkeyPatch) -> None:
    """Use a folder as the store: processes share it, and it needs no server."""
    store = fsspec.filesystem("file", auto_mkdir=True)
    patch.setattr(filesystem, "_filesystem", lambda protocol, pid: store)


def open_writer(root: Path, node: int, groups: tuple[Control, Control]) -> CheckpointWriter:
    """A writer of a rank that has a node, and so a folder, of its own."""
    folder = root / f"node{node}" / "checkpoints"
    remote = RemoteCheckpoints(ObjectFolder(f"file://{root}/store"))
    uploads = Uploads(remote, folder, Place(0, 1), keep=1, writable=lambda: remote)
    return CheckpointWriter(folder, keep=1, ranks=groups[0], background=groups[1], uploads=uploads)


def die_while_uploading(root: Path, victim: int, point: int) -> None:
    """Upload steps 1 and 2 on each rank. The victim dies before its `point`-th change of the store in the second."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    groups = Control(timedelta(seconds=60)), Control(timedelta(seconds=60))
    with pytest.MonkeyPatch.context() as patch:
        use_local_store(patch)
        writer = open_writer(root, dist.get_rank(), groups)
        assert save(writer, 1)
        writer.wait()
        passed = 0

        def before(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> Any:
                nonlocal passed
                if passed >= point:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1
                return original(*arguments)

            return wrapped

        for name in ("upload", "write", "remove") if dist.get_rank() == victim else ():
            patch.setattr(ObjectFolder, name, before(getattr(ObjectFolder, name)))
        assert save(writer, 2), "it was on the disks"
        writer.wait()
        (root / f"passed-{dist.get_rank()}").write_text(str(passed))


def walk(tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill the victim of two ranks before each change of the store. Return the newest checkpoints that were left."""
    use_local_store(monkeypatch)
    left: list[int] = []
    while True:
        root = tmp_path / f"{victim}-{len(left)}"
        codes = Processes(2, die_while_uploading, root, victim, len(left)).wait(60)
        assert codes[1 - victim] == 0, "the other rank goes on"
        # Another machine continues alone, and leaves nothing of what was begun.
        remote = RemoteCheckpoints(ObjectFolder(f"file://{root}/store"))
        found = downloads._fetch(remote, root / "fetched", None, best=False)
        assert_holds(found, step_of(found))
        assert (found / "generator.2-of-2.safetensors").exists(), "both nodes have uploaded"
        left.append(step_of(found))
        writer = open_writer(root, 9, (Control(None), Control(None)))
        assert save(writer, 3)
        writer.wait()
        objects = [path.relative_to(root / "store") for path in (root / "store").rglob("*") if path.is_file()]
        assert {path.parts[1] for path in objects} == {"latest", "step-00000003"}
        if codes[victim] == 0:
            return left
        assert codes[victim] == -signal.SIGKILL


def test_a_rank_killed_in_an_upload_leaves_a_valid_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two, before it uploads its only file, and never."""
    assert walk(tmp_path, 1, monkeypatch) == [1, 2]


@pytest.mark.slow
def test_rank_0_killed_at_any_point_of_an_upload_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = walk(tmp_path, 0, monkeypatch)
    # Two sets, layout and state; manifest; latest; then the removal of step 1 in one call.
    assert left == [1] * 6 + [2] * 2


def go_back_on_nodes(root: Path) -> None:
    """Ranks with folders of their own save steps 1 to 3, and go back to step 1 by its path on rank 0's node."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    runtime: Any = Control(timedelta(seconds=60))
    background = Control(timedelta(seconds=60))
    folder = root / f"node{runtime.rank}"
    config: Any = SimpleNamespace(run_url=f"file://{root}/store", run_folder=folder, checkpoint=SimpleNamespace(keep=3))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as held:
        use_local_store(patch)
        run = RemoteRun(config, runtime)
        if runtime.is_main:
            held.enter_context(run.taken(locked=True))
        run.open()

        def writer() -> CheckpointWriter:
            where = folder / "checkpoints"
            return CheckpointWriter(where, keep=3, ranks=runtime, background=background, uploads=run.uploads())

        with closing(writer()) as first:
            for step in (1, 2, 3):
                assert save(first, step)
        named = runtime.broadcast_object(str(folder / "checkpoints" / "step-00000001"))
        path, kept = _where_to_resume_remote(run, named, runtime)
        assert path == folder / "checkpoints" / "step-00000001"
        assert_holds(path, 1)
        assert kept == [1, 2, 3]
        if runtime.is_main:
            set_aside_later(folder, 1)
            run.go_back(1)
            assert list(run.checkpoints.complete()) == [1, 3, 2]
        runtime.barrier()
        with closing(writer()) as second:
            assert save(second, 2)
        runtime.barrier()
        assert list(run.checkpoints.complete()) == [2, 1]
        runtime.barrier()


def test_ranks_of_different_nodes_go_back_to_one_step(tmp_path: Path) -> None:
    """As a rollback does (`training.on_divergence`)."""
    assert Processes(2, go_back_on_nodes, tmp_path).wait(120) == [0, 0]
