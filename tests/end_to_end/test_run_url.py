"""A run in an object store, by nodes that share no folder: killed during an upload, it continues on other machines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from distgan.checkpoint import writer
from distgan.checkpoint.loading import find_checkpoint
from distgan.cli import main
from distgan.config import load_config
from distgan.data.storage import filesystem
from distgan.data.storage.objects import ObjectFolder
from distgan.errors import UserError
from distgan.runs import lease, remote
from distgan.runs.remote_status import remote_standing
from distgan.training.loop import train
from tests.ranks import Job, RankPool
from tests.runs import differing, losses, recipe, tensors, wait_until
from tests.servers import s3_server

URL = "s3://bucket/runs/x"
NETWORKS = {"generator": {"width": 16, "latent_size": 8}, "discriminator": {"width": 16}}
"""Large enough for each rank to write files of its own."""


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with s3_server() as running:
        yield running


def on_nodes(caches: Path) -> None:
    """Give each rank the cache of a machine of its own, and the lease a life of seconds."""
    os.environ["DISTGAN_CACHE"] = str(caches / os.environ.get("RANK", "0"))
    lease.LEASE_SECONDS, lease._POLL_SECONDS, remote.RENEW_SECONDS = 2.0, 0.1, 0.3


def hang_in_the_upload_of_step_6() -> None:
    """The last rank waits before it uploads its share of one set; the others have sent theirs."""
    on_nodes(Path(os.environ["CACHES"]))
    writer._PATIENCE_SECONDS = 100.0  # skip no checkpoint, however slow this machine is
    upload = ObjectFolder.upload

    def hang(self: ObjectFolder, path: Path, name: str) -> None:
        if "step-00000006/generator_ema.2-of-2" in name:
            time.sleep(600)
        upload(self, path, name)

    ObjectFolder.upload = hang  # type: ignore[method-assign]


def train_on(path: Path, caches: Path, environment: dict[str, str], *overrides: str) -> str:
    """Train a recipe in this process as one rank of several."""
    with mock.patch.dict(os.environ, environment):
        on_nodes(caches)
        filesystem._filesystem.cache_clear()
        return train(load_config(path, overrides)).outcome


def aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def test_killed_in_an_upload_it_continues_on_other_machines_bitwise(
    store: Any, ranks: RankPool, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, digits, run_dir=URL, training={"steps": 10}, checkpoint={"every": 2, "keep": 2}, **NETWORKS)
    job = Job(
        2,
        ["train", str(path)],
        environment=aws() | {"CACHES": str(tmp_path / "a")},
        before=hang_in_the_upload_of_step_6,
    )
    begun = "bucket/runs/x/checkpoints/step-00000006"
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "c"))
    try:
        wait_until(lambda: bool(store.glob(f"{begun}/*.1-of-2.safetensors")), job)
        assert str(remote_standing(URL)) == "running 4"
        # A second job is refused while the first one renews its lease.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lease, "_POLL_SECONDS", 0.1)
            with pytest.raises(
                UserError, match=r"run_dir = s3://bucket/runs/x: another job is training there \(process"
            ):
                train(load_config(path))
    finally:
        job.kill()
    assert not store.exists(f"{begun}/manifest.json")
    assert store.cat_file("bucket/runs/x/checkpoints/latest") == b"step-00000004\n"
    assert find_checkpoint(URL).name == "step-00000004"

    assert ranks.run(2, train_on, path, tmp_path / "b", aws()) == ["finished"] * 2
    assert str(remote_standing(URL)) == "finished 10"
    local = recipe(tmp_path, digits, training={"steps": 10}, checkpoint={"every": 10}, **NETWORKS)
    assert ranks.run(2, train_on, local, tmp_path / "d", {}) == ["finished"] * 2
    found = find_checkpoint(URL)
    assert len(list(found.glob("*.2-of-2.safetensors"))) >= 4, "both nodes have written"
    (tmp_path / "copy" / "checkpoints").mkdir(parents=True)
    found.rename(tmp_path / "copy" / "checkpoints" / found.name)
    store.get_file("bucket/runs/x/metrics.jsonl", str(tmp_path / "copy" / "metrics.jsonl"))
    assert differing(tensors(tmp_path / "copy", 10), tensors(tmp_path / "run", 10)) == []
    assert losses(tmp_path / "copy") == losses(tmp_path / "run")
    left = {name.split("/")[4] for name in store.find("bucket/runs/x/checkpoints")}
    assert left == {"latest", "step-00000008", "step-00000010"}
    assert len(store.find("bucket/runs/x/lease")) == 1


def test_a_run_in_a_store_on_one_machine(
    store: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped from another machine; continued here while the store refuses; then by another machine from the best."""
    url = "s3://bucket/runs/one"
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "a"))
    monkeypatch.setattr(remote, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_watch", lambda objects, last: last)
    evaluation = {"every": 4, "num_samples": 32, "metrics": ["sliced_wasserstein"]}
    path = recipe(tmp_path, digits, run_dir=url, training={"steps": 500}, evaluation=evaluation)
    from distgan.training.result import Callbacks

    def stop(step: int) -> None:
        if step == 5:
            main(["stop", url])

    assert train(load_config(path), callbacks=Callbacks(on_step=stop)).outcome == "preempted"
    main(["status", str(path)])
    standing = capsys.readouterr().out.splitlines()[-1].split()
    assert standing[0] == "preempted"
    assert standing[2:] == ["stop", "request"]
    step = int(standing[1])
    assert store.cat_file("bucket/runs/one/checkpoints/latest").decode() == f"step-{step:08d}\n"

    # The store refuses all checkpoints: the run finishes, keeps what it saved, and says so.
    upload, steps = ObjectFolder.upload, f"training.steps={step + 3}"

    def refuse(self: ObjectFolder, file: Path, name: str) -> None:
        if "checkpoints/" in name:
            raise PermissionError(13, "the disk of the store is full")
        upload(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectFolder, "upload", refuse)
        patch.setattr("distgan.training.resume._PAUSES", (0.0, 0.0))
        with pytest.raises(UserError) as caught:
            train(load_config(path, [steps]))
    assert f"step {step + 3}" in str(caught.value)
    assert "is not uploaded: the disk of the store is full; it is in " in str(caught.value)
    main(["status", url])
    assert capsys.readouterr().out.split()[:2] == ["failed", str(step)], "what was there is there"
    # The same command uploads it, and has nothing left to train.
    assert train(load_config(path, [steps])).step == step + 3
    main(["status", url])
    assert capsys.readouterr().out.split()[:2] == ["finished", str(step + 3)]

    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "b"))
    for resume, said in (("never", "has checkpoints up to step"), (f"{url}/checkpoints/step-99999999", "no valid ch")):
        with pytest.raises(UserError, match=said):
            train(load_config(path), resume=resume)
    best = json.loads(store.cat_file("bucket/runs/one/checkpoints/best.json"))["step"]
    more = [f"training.steps={best + 1}", "evaluation.every=0"]
    result = train(load_config(path, more), resume=f"{url}/checkpoints/step-{best:08d}")
    assert result.outcome == "finished"
    assert find_checkpoint(url).name == f"step-{best + 1:08d}", "later ones are given up"
    assert find_checkpoint(url, best=True).name == f"step-{best:08d}"
    assert [row["step"] for row in result.curves][-1] <= best + 1
    assert result.generator().step == best + 1
    assert {"config.yaml", "metrics.jsonl", "status.json"} <= {
        name.split("/")[3] for name in store.find("bucket/runs/one")
    }
