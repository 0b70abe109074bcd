"""The doctor's verdicts, alone and between two real processes of which one is ill."""

from __future__ import annotations

import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from distgan.cli import main
from distgan.config import load_config
from distgan.distributed.runtime import Runtime
from distgan.doctor import dry_run, examine, machine, network, storage
from distgan.doctor.finding import Finding, merge, summary
from distgan.errors import UserError
from distgan.monitoring import trackers
from distgan.training.loop import train
from distgan.version import code_digest
from tests.ranks import Job, RankPool
from tests.runs import recipe, status
from tests.shards import numbered_index

Usage = namedtuple("Usage", "total used free")


class Others:
    """A runtime whose other ranks answer what a test says."""

    def __init__(self, device: str, answers: list[Any] | None = None) -> None:
        self.device = torch.device(device)
        self._answers = answers or []

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, *self._answers]


def test_findings_of_all_ranks_are_one_line() -> None:
    same, other = Finding("ok", "device", "H100"), Finding("warning", "device", "A100")
    assert merge([[same], [same]]) == [same]
    assert [str(finding) for finding in merge([[same], [other], [same]])] == [
        "ok       device         ranks 0, 2: H100",
        "warning  device         rank 1: A100",
    ]
    many = merge([[same] if rank else [other] for rank in range(20)])
    assert many[1].text == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more: H100"


def test_the_summary_says_whether_to_start() -> None:
    ok, warning, failed = (Finding(verdict, "x", "y") for verdict in ("ok", "warning", "FAILED"))
    assert summary([ok, ok]) == "ready to train"
    assert summary([ok, warning]) == "ready to train, with 1 warning"
    assert summary([warning, warning, ok]) == "ready to train, with 2 warnings"
    assert summary([warning, failed, ok]) == "1 of 3 checks FAILED; fix these first"


def test_other_code_elsewhere_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.versions(Others("cpu")).text
    assert code_digest()[:8] in here
    found = machine.versions(Others("cpu", [here, here.replace("torch 2", "torch 1")]))
    assert found.verdict == "FAILED"
    assert "rank 2 has Python" in found.text


def test_two_processes_on_one_gpu_are_a_failure() -> None:
    import socket

    host = socket.gethostname()
    found = machine.processes(Others("cuda:0", [(host, "cuda:0")]))
    assert (found.verdict, "share cuda:0" in found.text) == ("FAILED", True)
    assert machine.processes(Others("cuda:0", [(host, "cuda:1"), ("elsewhere", "cuda:0")])).verdict == "ok"
    assert machine.processes(Others("cpu", [(host, "cpu")])).text == "2 on 1 host, on CPUs"


def test_a_driver_without_a_gpu_for_torch_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Path", lambda path: Path("/dev/null"))
    found = machine.device(Others("cpu"))
    assert (found.verdict, "torch finds no GPU" in found.text) == ("FAILED", True)


def test_few_cores_and_little_memory_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(4)))
    assert machine.cores(Others("cpu"), workers=3).verdict == "ok"
    assert machine.cores(Others("cpu"), workers=4).verdict == "warning"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(0, 0, 64_000_000))
    assert machine.shared_memory() == Finding(
        "warning", "shared memory",
        "64 MB free in /dev/shm, expected 1 GB; start the container with more, for example docker run --shm-size=8g",
    )  # fmt: skip


@pytest.mark.parametrize(("free", "verdict"), [(1.9e9, "FAILED"), (3.9e9, "warning"), (9e9, "warning"), (11e9, "ok")])
def test_room_for_the_checkpoints_kept_and_two_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, verdict: str
) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: Usage(0, 0, free))
    assert storage.room(tmp_path, checkpoint=400_000_000, keep=3).verdict == verdict


def test_a_cache_that_does_not_fit_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"run_dir": "r", "training": {"steps": 5, "batch_size": 8}}
    config = dry_run.parse_config(
        values | {"data": {"path": "d", "resolution": 32, "cache_dir": str(tmp_path / "a" / "b"), "cache_gigabytes": 5}}
    )
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: Usage(0, 0, 4e9))
    assert storage.shard_cache(config).verdict == "FAILED"
    (tmp_path / "a" / "b" / "shards").mkdir(parents=True)
    with open(tmp_path / "a" / "b" / "shards" / "x.tar", "wb") as shard:
        shard.truncate(2_000_000_000)  # sparse; what is cached already needs no more room
    assert storage.shard_cache(config).verdict == "ok"


@pytest.mark.parametrize(("detector", "verdict"), [("classifier", "ok"), ("inception", "warning")])
def test_detector_weights(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, detector: str, verdict: str
) -> None:
    evaluation = {"every": 5, "detector": detector, "cache_dir": str(tmp_path / "cache")}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = load_config(recipe(tmp_path, digits, evaluation=evaluation))
    assert dry_run.detectors(config)[0].verdict == verdict
    own = load_config(tmp_path / "recipe.yaml", ["evaluation.detector=torch.nn:Identity"])
    assert "torch.nn:Identity" in dry_run.detectors(own)[0].text
    if detector == "inception":
        missing = load_config(tmp_path / "recipe.yaml", [f"evaluation.detector.weights={tmp_path / 'absent'}"])
        assert dry_run.detectors(missing)[0].verdict == "FAILED"
        there = load_config(tmp_path / "recipe.yaml", [f"evaluation.detector.weights={tmp_path / 'recipe.yaml'}"])
        assert dry_run.detectors(there)[0].verdict == "ok"


def test_trackers_need_their_packages(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe(tmp_path, digits, monitoring={"trackers": ["wandb"]}))
    monkeypatch.setattr(trackers, "is_installed", lambda name: False)
    (found,) = dry_run.trackers(config)
    assert found.verdict == "FAILED"
    assert "pip install wandb" in found.text
    monkeypatch.setattr(trackers, "is_installed", lambda name: True)
    assert dry_run.trackers(config) == []


@pytest.mark.parametrize(("classes", "count"), [(0, 40), (1, 40), (2, 8)])
def test_data_that_cannot_train_the_classifier_are_a_failure(tmp_path: Path, classes: int, count: int) -> None:
    shards = tmp_path / "shards"
    numbered_index(shards, [count], classes=classes)
    evaluation = {"every": 5, "detector": "classifier", "cache_dir": str(tmp_path / "cache")}
    config = recipe(tmp_path, shards, evaluation=evaluation)
    lines: list[str] = []
    assert not examine(load_config(config), lines.append)
    [failed] = [line for line in lines if line.startswith("FAILED")]
    for part in ("evaluation.detector = classifier: found", "evaluation.detector=inception", "evaluation.every=0"):
        assert part in failed
    with pytest.raises(UserError, match=r"evaluation\.every=0"):
        train(load_config(config))
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "it trains no step first"
    lines.clear()
    assert examine(load_config(config, ["evaluation.every=0"]), lines.append), lines


def test_long_checks_are_announced_and_warnings_of_a_run_are_findings(tmp_path: Path, digits: Path) -> None:
    config = load_config(recipe(tmp_path, digits, data={"mirror": True}))
    lines: list[str] = []
    assert examine(config, lines.append)
    verdicts = [(line[:8].strip(), line[9:23].strip()) for line in lines]
    for subject in ("reading", "training"):
        assert verdicts.index(("checking", subject)) < verdicts.index(("ok", subject)), lines
    (labels,) = [line for line in lines if "data.labels" in line]
    assert labels.startswith("warning  recipe ")


def test_alone_and_without_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["versions", "packages", "processes"]
    assert all(line.startswith(("ok ", "warning ")) for line in lines[:-1])
    assert lines[-1].startswith("ready to train")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_rehearsed_on_two_ranks_and_leaves_nothing(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits)
    launcher = {"TORCHELASTIC_MAX_RESTARTS": "3"}
    assert Job(2, ["doctor", str(config)], log=tmp_path / "log", environment=launcher).wait() == [0, 0]
    lines = (tmp_path / "log").read_text().splitlines()
    subjects = [line.split("  ")[0] + line[9:23].strip() for line in lines[:-1]]
    for subject in ("all-reduce", "clocks", "run folder", "data", "reading", "training", "free disk"):
        assert any(subject in found for found in subjects), lines
    assert lines[-1].startswith("ready to train")
    assert "is the same on all ranks" in (tmp_path / "log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "recipe.yaml"]


def test_a_failure_ends_with_1(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, digits, data={"path": str(tmp_path / "nowhere")})
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(config)])
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAILED")] == [line for line in lines if "nowhere" in line]
    assert "1 of" in lines[-1]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("CUDA error: an illegal access\nwas made", ["RuntimeError: CUDA error: an illegal access was made"]),
        ("CUDA out of memory.\nTried to allocate 20 GiB", ["training.batch_size = 16", "memory. Tried to allocate 20"]),
    ],
)
def test_whatever_fails_in_the_rehearsal_there_is_a_verdict(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: list[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("distgan.training.loop.train_step", full)
    lines: list[str] = []
    assert not examine(load_config(recipe(tmp_path, digits)), lines.append)
    [failed] = [line for line in lines if line.startswith("FAILED")]
    assert [part for part in told if part not in failed] == []
    assert "1 of" in lines[-1]


def test_a_run_that_exists_is_not_touched(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training={"steps": 2})
    assert Job(1, ["train", str(config)]).wait() == [0]
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    lines: list[str] = []
    assert examine(load_config(config), lines.append)
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    assert status(tmp_path / "run")["restarts"] == 0


def ill(rank: int, what: str, folder: str, shards: str) -> list[str]:
    """What two ranks find when one of them has the illness."""
    runtime = Runtime()
    place = Path(folder) / ("same" if what == "clock" else f"rank-{runtime.rank}")
    place.mkdir(parents=True, exist_ok=True)
    if what == "clock" and runtime.rank == rank:
        truth = time.time
        time.time = lambda: truth() + 100
        try:
            return [str(network.clocks(runtime))]
        finally:
            time.time = truth
    if what == "clock":
        return [str(network.clocks(runtime))]
    if what == "data":
        config = load_config(recipe(place, Path(folder) / "nowhere" if runtime.rank == rank else Path(shards)))
        return [str(dry_run.index(config, runtime)[1])]
    storage._PATIENCE_SECONDS = 0.5
    return [str(finding) for finding in storage.shared_folder(runtime, place, "probe")]


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("clock", ["FAILED", "rank 1 is +100 s off rank 0"]),
        ("folder", ["FAILED", "rank 1 on", "cannot read rank 0's files", "run_dir"]),
        ("data", ["FAILED", "data", "rank 1: ", "nowhere"]),
    ],
)
def test_an_ill_rank_is_named(tmp_path: Path, digits: Path, ranks: RankPool, what: str, parts: list[str]) -> None:
    for lines in ranks.run(2, ill, 1, what, str(tmp_path), str(digits)):
        assert all(part in lines[-1] for part in parts), lines
