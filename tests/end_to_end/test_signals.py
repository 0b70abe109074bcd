"""Being asked to stop, alone and under both launchers: save, leave together, say so, leave no process behind."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distgan.cli import main
from distgan.data.loader_processes import STOP_SIGNALS
from distgan.runs import stop_request
from tests.ranks import Job, free_port
from tests.runs import recipe, rows, status, wait_for_checkpoint, wait_until

ROOT = Path(__file__).parents[2]
ENDLESS = {"steps": 1_000_000, "batch_size": 16}


def launched(launcher: str, config: Path, log: Path) -> subprocess.Popen[bytes]:
    """`distgan train` as a user starts it, on two ranks if there is a launcher."""
    python = [sys.executable, "-m"]
    command = {
        "alone": python,
        "accelerate": [
            *python, "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m",
        ],
        "torchrun": [
            *python, "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m",
        ],
    }[launcher]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    with open(log, "wb") as output:
        return subprocess.Popen(
            [*command, "distgan", "train", str(config)],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


def trainers(root: psutil.Process) -> list[psutil.Process]:
    """The processes that train: those whose command line ends in the recipe's, without launchers and helpers."""
    family = [root, *root.children(recursive=True)]
    found = []
    for process in family:
        line = process.cmdline()
        if line[-2:-1] == ["train"] and "launch" not in " ".join(line) and "torch.distributed.run" not in line:
            found.append(process)
    return found


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_training(run: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 2):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def check_stopped(run: Path, family: list[psutil.Process], log: Path, seconds: float = 30) -> None:
    _, alive = psutil.wait_procs(family, timeout=seconds)
    assert not alive, f"orphans: {alive}\n{log.read_text()}"
    found = status(run)
    assert found["outcome"] == "preempted", log.read_text()
    assert (run / "checkpoints" / f"step-{found['step']:08d}" / "manifest.json").exists()
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{found['step']:08d}"
    assert rows(run)[-1]["step"] <= found["step"]


@pytest.mark.parametrize(
    ("launcher", "number", "to"),
    [
        ("alone", signal.SIGTERM, "ranks"),
        ("accelerate", signal.SIGUSR1, "one rank"),
        ("torchrun", signal.SIGINT, "all"),
        pytest.param("alone", signal.SIGINT, "ranks", marks=pytest.mark.slow),
        pytest.param("alone", signal.SIGHUP, "all", marks=pytest.mark.slow),
        pytest.param("accelerate", signal.SIGTERM, "launcher", marks=pytest.mark.slow),
        pytest.param("torchrun", signal.SIGTERM, "launcher", marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(
    tmp_path: Path, digits: Path, started: list[subprocess.Popen[bytes]], launcher: str, number: int, to: str
) -> None:
    config = recipe(
        tmp_path, digits, training=ENDLESS, checkpoint={"every": 1_000_000, "keep": 2}, data={"num_workers": 1}
    )
    log = tmp_path / "log"
    process = launched(launcher, config, log)
    started.append(process)
    wait_until_training(tmp_path / "run", process, log)
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    ranks = trainers(root)
    assert len(ranks) == (1 if launcher == "alone" else 2)
    if to == "all":
        os.killpg(process.pid, number)
    else:
        for target in {"launcher": [root], "one rank": ranks[-1:], "ranks": ranks}[to]:
            target.send_signal(number)
    # Reaped here, so that it does not stay as a zombie that looks alive.
    code = process.wait(timeout=60)
    check_stopped(tmp_path / "run", family, log)
    assert launcher != "alone" or code == 0
    said = (
        f"{signal.Signals(number).name}: saved step-{status(tmp_path / 'run')['step']:08d} and stopped; start the same"
    )
    assert log.read_text().count(said) == 1, log.read_text()


def test_stopped_by_request(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training=ENDLESS)
    job = Job(2, ["train", str(config)], log=tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Job(1, ["stop", str(tmp_path / "run")]).wait() == [0]
    assert job.wait(30) == [0, 0]
    assert status(tmp_path / "run")["outcome"] == "preempted"
    assert not (tmp_path / "run" / "stop.request").exists()
    assert "stop request: saved step-" in (tmp_path / "log").read_text()


def test_all_ranks_are_killed(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, digits, training=ENDLESS)
    job = Job(2, ["train", str(config)], log=tmp_path / "log")
    wait_for_checkpoint(tmp_path / "run", 2, job)
    main(["status", str(config)])
    job.kill()
    main(["status", str(config)])
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("running ")
    assert after.startswith("killed ")
    assert int(after.split()[1]) >= 2
    assert status(tmp_path / "run")["outcome"] == "running"


@dataclasses.dataclass
class Presses:
    """A clock of the presses of Ctrl-C, that goes on ten seconds for each, and leaves a file for each."""

    folder: Path
    count: int = 0

    def monotonic(self) -> float:
        self.count += 1
        (self.folder / f"press-{self.count}").touch()
        return 10.0 * self.count


def count_presses(folder: Path) -> None:
    stop_request.time = Presses(folder)  # type: ignore[attr-defined]


def catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    [line] = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_a_second_interrupt_aborts(tmp_path: Path, digits: Path) -> None:
    # One very long step, so that the first request is not acted upon before the second.
    training = {"steps": 3, "batch_size": 16, "critic_steps": 1_000_000}
    config = recipe(tmp_path, digits, training=training)
    job = Job(1, ["train", str(config)], log=tmp_path / "log", before=functools.partial(count_presses, tmp_path))
    [process] = job.processes
    assert process.pid is not None
    pid = process.pid
    # The last handler that a run sets; before that, the first press would be Python's own.
    wait_until(lambda: catches(pid, STOP_SIGNALS[-1]) and (tmp_path / "run" / "config.yaml").exists(), job, 60)
    job.signal(signal.SIGINT)
    wait_until((tmp_path / "press-1").exists, job, 60)
    job.signal(signal.SIGINT)
    assert job.wait(60) == [130]
    assert (tmp_path / "press-2").exists(), "the first press ended the run"
    assert status(tmp_path / "run")["outcome"] == "failed"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_lost_rank_is_a_failure_and_not_a_preemption(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training=ENDLESS)
    log = tmp_path / "log"
    job = Job(2, ["train", str(config)], log=log)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.processes[1].kill()
    job.processes[1].join(60)
    # What torchrun does to the survivors of a crash.
    job.processes[0].terminate()
    assert job.wait(60)[0] not in (0, None)
    assert status(tmp_path / "run")["outcome"] == "failed"
    assert "another rank" in status(tmp_path / "run")["reason"]
