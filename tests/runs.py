"""Small runs for tests: shards, recipes, and what is left of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from distgan.checkpoint.layout import read_layout
from distgan.checkpoint.loading import load_sets
from tests.ranks import Job


def recipe(folder: Path, shards: Path, **sections: Any) -> Path:
    """A run of seconds at 16x16 with a lazy penalty, bitwise reproducible; sections are merged over it."""
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "seed": 7,
        "data": {"path": str(shards), "resolution": 16, "channels": 1, "num_workers": 0},
        "generator": {"width": 4, "latent_size": 8},
        "discriminator": {"width": 4},
        "objective": {"r1": {"gamma": 1.0, "every": 3}},
        "training": {"steps": 12, "batch_size": 16, "critic_steps": 2, "deterministic": True},
        "ema": {"statistics_samples": 32},
        "checkpoint": {"every": 2, "keep": 100},
        "monitoring": {"every": 3, "samples_every": 1000, "num_samples": 4, "tensorboard": False},
        "evaluation": {"batch_size": 16},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_until(condition: Callable[[], bool], job: Job, seconds: float = 90) -> None:
    """Wait while a job runs. Fails after so many seconds, or if the job ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert job.running(), "the job ended by itself"
        time.sleep(0.005)


def wait_for_rows(run: Path, job: Job, count: int = 1) -> None:
    """Wait until a job has written so many rows of metrics."""
    file = run / "metrics.jsonl"
    # Ends of lines, because the last line may be half written.
    wait_until(lambda: file.exists() and file.read_text().count("\n") >= count, job)


def wait_for_checkpoint(run: Path, step: int, job: Job) -> None:
    """Wait until a job has written the checkpoint of a step."""
    wait_until((run / "checkpoints" / f"step-{step:08d}").exists, job)


def losses(run: Path) -> dict[int, dict[str, float]]:
    """What metrics.jsonl says of the training itself, without speed and memory."""
    kept = ("loss/", "discriminator/", "gradient_norm/", "ema/", "learning_rate/", "skipped")
    return {row["step"]: {k: v for k, v in row.items() if k.startswith(kept)} for row in rows(run)}


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything of a checkpoint that training depends on."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    sets = load_sets(folder, sorted(read_layout(folder).sets))
    return {f"{name}/{key}": value for name, of in sets.items() for key, value in of.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal."""
    assert one.keys() == other.keys()
    assert len(one) > 50
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def status(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))
