"""Measure seconds per step of `distgan train`: in single processes, and on two simulated hosts with a slow link."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.commands import ENGINES, ROOT, later_wins
from tools.hosts import SUBNET, Hosts, hosts, missing

INTERVAL, INTERVALS = 8, 4


def run_settings(folder: str | Path) -> list[str]:
    """Return overrides that turn off everything but the training: no evaluations, samples or checkpoints."""
    return [
        f"run_dir={folder}", f"training.steps={INTERVAL * INTERVALS}", f"monitoring.every={INTERVAL}",
        "monitoring.samples_every=1000000", "monitoring.tensorboard=false", "checkpoint.every=1000000",
        "evaluation.every=0", "data.num_workers=0", "training.initial_critic_steps=0",
        "training.extra_critic_steps=null",
    ]  # fmt: skip


def step_seconds(run: Path) -> float:
    """Return the median seconds per step over the intervals of a run without the first one."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds: list[float] = [row["speed/step_seconds"] for row in rows if "speed/step_seconds" in row]
    return statistics.median(seconds[1:])


def alone(recipe: str, settings: Sequence[str], images: int, copies: int = 1) -> float:
    """Return the seconds per step of a single process with batch size `images`.

    Args:
        copies: independent processes that run at the same time. The result is their mean.
    """
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, "-m", "distgan", "train", recipe,
             *later_wins(*settings, *run_settings(f"{folder}/{copy}"), f"training.batch_size={images}")]
            for copy in range(copies)
        ]  # fmt: skip
        with open(f"{folder}/log", "wb") as log:
            running = [subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) for command in commands]
            _wait(running, Path(folder, "log"))
        return statistics.mean(step_seconds(Path(folder, str(copy))) for copy in range(copies))


def _wait(processes: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    """Wait for all processes. If one fails, exit with the log as the message."""
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(log.read_text())


def why_no_hosts() -> str | None:
    """Return what this machine lacks for `shaped`, or None."""
    return missing() or (None if shutil.which("tc") else "no tc: apt-get install iproute2")


@contextmanager
def shaped(megabits: float) -> Iterator[Hosts]:
    """Yield two hosts whose link is limited to this many Mbit/s."""
    with hosts() as two:
        for host in (1, 2):
            subprocess.run(
                ["tc", "-n", f"distgan{host}", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate",
                 f"{megabits}mbit", "burst", "64kb", "latency", "400ms"], check=True,
            )  # fmt: skip
        yield two


def together(two: Hosts, recipe: str, settings: Sequence[str], ranks: int, engine: str = "ddp") -> float:
    """Return the seconds per step of ranks on two hosts under one of `ENGINES`, or `hsdp` with a replica per host."""
    accelerate = {**ENGINES, "ddp": "multi-node.yaml", "hsdp": "hsdp.yaml"}[engine]
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "accelerate.yaml")
        settings_of_engine = (ROOT / "launch/accelerate" / accelerate).read_text()
        own.write_text(settings_of_engine.replace("dp_shard_size: 8", f"dp_shard_size: {ranks // 2}"))
        log = Path(folder, "log")
        arguments = "train", recipe, *later_wins(*settings, *run_settings(f"{folder}/run"))
        nodes = two.launch(log, *arguments, PROCESSES_PER_NODE=str(ranks // 2), ACCELERATE_CONFIG=str(own))
        _wait(nodes, log)
        return step_seconds(Path(folder, "run"))


def latency(two: Hosts, ranks: int) -> float:
    """Return the seconds per message of a ring all-reduce of one number, without other traffic."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        nodes = [
            two.start(host, [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host - 1),
                "--nproc-per-node", str(ranks // 2), "--master-addr", f"{SUBNET}.1", "--master-port", "29500",
                __file__, f"{folder}/seconds",
            ], log)
            for host in (1, 2)
        ]  # fmt: skip
        _wait(nodes, log)
        return float(Path(folder, "seconds").read_text()) / (2 * (ranks - 1))


def work(path: str) -> None:
    """Time all-reduces of one number as one rank. Rank 0 writes the median seconds to `path`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    seconds = []
    for _ in range(100):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(torch.ones(1))
        seconds.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        Path(path).write_text(str(statistics.median(seconds)))
    dist.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1])
