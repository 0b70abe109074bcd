"""Runs under the engines that a launcher chooses: one format of checkpoints, one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import LAUNCHED, needs
from tests.ranks import Job
from tests.runs import losses, recipe, tensors

STEPS = 12
# Without R1: its gradient jumps where an error of 1e-7 puts an activation on the other side of a rectifier's kink.
MOVED = {"objective": {"r1": None}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert Job(2, ["train", str(recipe(folder, digits, **MOVED))]).wait() == [0, 0]
    return folder / "run"


@pytest.mark.parametrize("engine", [needs("zero2"), needs("fsdp")])
def test_a_run_moves_between_engines_and_world_sizes(
    tmp_path: Path, digits: Path, undisturbed: Path, engine: str
) -> None:
    """DDP at 2, then the engine at 4, then DDP at 1, are the run that was DDP at 2 throughout."""
    config, log = str(recipe(tmp_path, digits, **MOVED)), tmp_path / "log"
    for kind, world_size, steps, tolerance in (("ddp", 2, 4, 0.0), (engine, 4, 8, 1e-5), ("ddp", 1, STEPS, 1e-4)):
        job = Job(world_size, ["train", config, f"training.steps={steps}"], log=log, environment=LAUNCHED[kind])
        assert job.wait() == [0] * world_size, log.read_text()
        found, expected = tensors(tmp_path / "run", steps), tensors(undisturbed, steps)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = max(1e-3, value.abs().max().item())
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=f"step {steps}: {name}")
    for step, values in losses(undisturbed).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(values, rel=1e-4)


BLOCKS = {"architecture": "r3gan", "width": 8, "max_width": 16}


@pytest.mark.parametrize(
    ("engine", "network"), [pytest.param("zero1", {}, marks=needs("zero1").marks), ("fsdp", {}), ("fsdp", BLOCKS)]
)
def test_interrupted_and_resumed_is_bitwise_the_run_that_was_not(
    tmp_path: Path, digits: Path, engine: str, network: dict[str, Any]
) -> None:
    """Inside the curve of a scheduled beta2, by which Adam corrects its moments."""
    rising = {"betas": [0, {"start": 0.9, "end": 0.99, "over": 0.2, "shape": "cosine"}]}
    players = {role: {**network, "optimizer": rising} for role in ("generator", "discriminator")}
    checkpointed = {"steps": 12, "batch_size": 16, "deterministic": True, "activation_checkpointing": bool(network)}
    config = str(recipe(tmp_path, digits, **players, training=checkpointed))
    for folder, parts in (("whole", [6]), ("parts", [4, 6])):
        for steps in parts:
            changes = [f"training.steps={steps}", f"run_dir={tmp_path / folder}"]
            assert Job(2, ["train", config, *changes], environment=LAUNCHED[engine]).wait() == [0, 0]
    found, expected = tensors(tmp_path / "parts", 6), tensors(tmp_path / "whole", 6)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
