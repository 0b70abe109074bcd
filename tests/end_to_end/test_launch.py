"""The launch files for real, as far as a machine without GPUs can: two processes, alone or as two machines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from distgan.config import load_config
from tests.engines import deepspeed_is_there
from tests.ranks import Job, free_port
from tests.runs import differing, recipe, status, tensors

ROOT = Path(__file__).parents[2]
STEPS = 60
WITH_DEEPSPEED = pytest.mark.skipif(not deepspeed_is_there(), reason="needs distgan[deepspeed]")

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command in the root, its output in a file; what is left of it in the end is killed."""
    processes: list[psutil.Popen] = []
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}

    def run(command: list[str], log: IO[bytes], **environment: str) -> psutil.Popen:
        process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**inherited, **environment})
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            for each in [*process.children(recursive=True), process]:
                each.kill()
            process.wait()


def with_config(name: str, config: Path, *flags: str) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{name}.yaml"]
    return [*launch, *flags, "-m", "distgan", "train", str(config)]


@pytest.mark.parametrize(
    ("name", "world_size", "engine"),
    [
        ("cpu", 2, "DDP"),
        pytest.param("single-gpu", 1, None, marks=pytest.mark.slow),
        pytest.param("multi-gpu", 2, "DDP", marks=pytest.mark.slow),
        pytest.param("deepspeed-zero1", 2, "DeepSpeed ZeRO-1", marks=[WITH_DEEPSPEED, pytest.mark.slow]),
        pytest.param("deepspeed-zero2", 2, "DeepSpeed ZeRO-2", marks=WITH_DEEPSPEED),
        ("fsdp", 2, "FSDP2"),
    ],
)
def test_on_one_machine(
    tmp_path: Path, digits: Path, start: Start, name: str, world_size: int, engine: str | None
) -> None:
    config = recipe(tmp_path, digits, training={"steps": 2})
    with open(tmp_path / "log", "wb") as log:
        command = with_config(name, config, "--num_processes", str(world_size))
        assert start(command, log).wait(120) == 0, (tmp_path / "log").read_text()
    assert status(tmp_path / "run")["outcome"] == "finished"
    assert status(tmp_path / "run")["world_size"] == world_size
    # Accelerate has ways to start one of these and get another.
    assert engine is None or f"2 ranks train with {engine}" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "setting", "key", "value", "other"),
    [
        ("--mixed_precision", "bf16", "mixed_precision", "bf16", "no"),
        ("--dynamo_backend", "inductor", "compile", True, "false"),
    ],
)
def test_settings_of_the_launcher_train_and_are_written_down(
    tmp_path: Path, digits: Path, start: Start, flag: str, setting: str, key: str, value: object, other: str
) -> None:
    config = recipe(tmp_path, digits, training={"steps": 1})
    flags = ["--multi_gpu", "--num_processes", "2", flag, setting, "--main_process_port", "0"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "distgan"]
    with open(tmp_path / "log", "wb") as log:
        assert start([*launch, "train", str(config)], log).wait(240) == 0, (tmp_path / "log").read_text()
    assert getattr(load_config(tmp_path / "run" / "config.yaml").training, key) == value
    assert f"training.{key} = {str(value).lower()}, as accelerate launch sets it" in (tmp_path / "log").read_text()
    # Where the config has the key, the two must not differ.
    for command in ("train", "doctor"):
        again = [*launch, command, str(config), f"training.{key}={other}", f"run_dir={tmp_path}/second"]
        with open(tmp_path / command, "wb") as log:
            assert start(again, log).wait(120) != 0
        said = (tmp_path / command).read_text().splitlines()
        (line,) = [line for line in said if line.startswith(("distgan: error", "FAILED"))]
        assert f"{flag} {setting}" in line
        assert f"training.{key} = {other}" in line


@WITH_DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_CPU": "true"}])
def test_deepspeed_by_a_flag(tmp_path: Path, digits: Path, start: Start, environment: dict[str, str]) -> None:
    """The variable makes accelerate itself train with DDP and say nothing."""
    config = recipe(tmp_path, digits, training={"steps": 2})
    launch = ["-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "2", "--num_processes", "2"]
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, *launch, "-m", "distgan", "train", str(config)]
        assert start(command, log, **environment).wait(120) == 0, (tmp_path / "log").read_text()
    assert "2 ranks train with DeepSpeed ZeRO-2" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_two_machines_go_on_when_a_rank_is_lost(tmp_path: Path, digits: Path, start: Start) -> None:
    """The launcher of a Slurm node, twice, with multi-node.yaml: bitwise the run that was never disturbed."""
    config = recipe(tmp_path, digits, training={"steps": STEPS}, checkpoint={"every": 10})
    undisturbed = tmp_path / "undisturbed"
    assert Job(2, ["train", str(config), f"run_dir={undisturbed}"]).wait() == [0, 0]
    settings = {
        "VENV": str(Path(sys.executable).parents[1]), "SLURM_NNODES": "2", "NODE_ADDR": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = ["launch/slurm/node.sh", "train", str(config)]
    with open(tmp_path / "log", "wb") as log:
        nodes = [start(command, log, SLURM_NODEID=str(node), **settings) for node in (0, 1)]
        deadline = time.monotonic() + 90
        while not (tmp_path / "run" / "checkpoints" / "step-00000020").exists():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        [rank] = [child for child in nodes[1].children() if child.environ().get("LOCAL_RANK") == "0"]
        rank.kill()
        assert [node.wait(120) for node in nodes] == [0, 0], (tmp_path / "log").read_text()
    assert status(tmp_path / "run")["restarts"] == 1
    assert "resuming from" in (tmp_path / "log").read_text()
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed, STEPS)) == []


def test_a_launcher_does_not_repeat_what_failed_by_itself(tmp_path: Path, digits: Path, start: Start) -> None:
    config = recipe(tmp_path, digits, training={"steps": 1_000}, data={"retries": 0})
    tampered = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    run = tmp_path / "run"
    assert Job(1, ["train", str(config), "discriminator.optimizer.learning_rate=1e30", "training.max_skipped_updates=2",
                   "discriminator.normalization=none", "monitoring.every=1"]).wait() == [2]  # fmt: skip
    reason = status(run)["reason"]
    with open(tmp_path / "log", "wb") as log:
        assert start([sys.executable, "-m", "distgan", "train", str(config)], log, **tampered).wait(60) == 2
    assert (
        f"not restarted, because the last attempt did not fail from a lost rank: {reason}"
        in (tmp_path / "log").read_text()
    )
    assert status(run)["reason"] == reason
    # Of another launch, it says nothing of what this one may expect.
    mended = ["training.steps=2", "monitoring.every=1"]
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, "-m", "distgan", "train", str(config), *mended]
        assert start(command, log, **tampered, TORCHELASTIC_RUN_ID="another").wait(60) == 0
