"""Runs under the engines that a launcher chooses: one format of checkpoints, one stream."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engines import LAUNCHED, needs
from tests.ranks import Job
from tests.runs import differing, losses, recipe, tensors, wait_for_checkpoint

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


RISING = {"betas": [0, {"start": 0.9, "end": 0.99, "over": 0.2, "shape": "cosine"}]}
CONVOLUTIONS = {"architecture": "r3gan", "width": 8, "max_width": 16}
GAT = {"architecture": "gat", "patch_size": 4, "width": 16, "depth": 4, "heads": 2, "optimizer": RISING}
DIFFERENCES = {"gamma": 1.0, "method": "finite_difference"}
PLAIN: dict[str, Any] = {role: {"optimizer": RISING} for role in ("generator", "discriminator")}
BLOCKS: dict[str, Any] = {role: {**CONVOLUTIONS, "optimizer": RISING} for role in ("generator", "discriminator")}
TRANSFORMERS: dict[str, Any] = {
    "data": {"labels": True},
    "generator": {**GAT, "latent_distribution": "normal"},
    "discriminator": {**GAT, "projection_size": 16},
    "objective": {"adversarial": "relativistic_paired", "r1": DIFFERENCES, "r2": {"gamma": 1.0, "every": 2}},
}
ONLY_DIFFERENCES = {"objective": {"adversarial": "relativistic_paired", "r1": DIFFERENCES, "r2": DIFFERENCES}}
CHECKPOINTED, COMPILED = {"activation_checkpointing": True}, {"compile": "blocks"}


def killed(engine: str, ranks: int, networks: dict[str, Any], training: dict[str, Any], *, slow: bool = True) -> Any:
    marks = [*needs(engine).marks, *[pytest.mark.slow] * slow]
    return pytest.param(engine, ranks, networks, training, marks=marks)


@pytest.mark.parametrize(
    ("engine", "world_size", "networks", "training"),
    [
        killed("fsdp", 2, BLOCKS, CHECKPOINTED, slow=False),
        killed("zero1", 2, PLAIN, {}, slow=False),
        killed("ddp", 1, TRANSFORMERS, CHECKPOINTED),
        killed("ddp", 4, TRANSFORMERS, CHECKPOINTED),
        killed("ddp", 2, TRANSFORMERS, COMPILED),
        killed("zero1", 4, TRANSFORMERS, CHECKPOINTED),
        killed("zero2", 2, TRANSFORMERS, COMPILED),
        killed("zero2", 4, TRANSFORMERS, {}),
        killed("fsdp", 2, PLAIN, {}),
        killed("fsdp", 2, TRANSFORMERS, COMPILED | CHECKPOINTED),
        killed("fsdp", 4, TRANSFORMERS | ONLY_DIFFERENCES, COMPILED),
        killed("fsdp", 4, TRANSFORMERS, {"mixed_precision": "bf16"}),
        killed("hsdp", 4, TRANSFORMERS, CHECKPOINTED),
        killed("hsdp", 4, TRANSFORMERS | ONLY_DIFFERENCES, COMPILED | {"gradient_accumulation_steps": 2}),
    ],
)
def test_killed_and_resumed_is_bitwise_the_run_that_was_not(
    tmp_path: Path, digits: Path, engine: str, world_size: int, networks: dict[str, Any], training: dict[str, Any]
) -> None:
    """Inside the curve of a scheduled beta2, by which Adam corrects its moments."""
    log = tmp_path / "log"
    config = str(recipe(tmp_path, digits, **networks, training={"steps": STEPS, **training}))

    def start(folder: str) -> Job:
        arguments = ["train", config, f"run_dir={tmp_path / folder}"]
        return Job(world_size, arguments, log=log, environment=LAUNCHED[engine], before=compile_without_a_compiler)

    assert start("whole").wait(300) == [0] * world_size, log.read_text()
    job = start("parts")
    wait_for_checkpoint(tmp_path / "parts", 2, job)
    job.kill(world_size - 1)
    assert not (tmp_path / "parts" / "checkpoints" / f"step-{STEPS:08d}").exists(), "killed too late"
    assert start("parts").wait(300) == [0] * world_size, log.read_text()
    assert "resuming from" in log.read_text()
    assert differing(tensors(tmp_path / "parts", STEPS), tensors(tmp_path / "whole", STEPS)) == []


def compile_without_a_compiler() -> None:
    """Trace and cut as torch.compile does, but run the graphs as they are, which takes seconds instead of minutes."""
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign]


def test_a_historical_average_of_blocks_is_refused(tmp_path: Path, digits: Path) -> None:
    """It would be a second copy of all weights on each rank."""
    averaging = {"objective": {"historical_averaging": {"generator": 0.1}}}
    config, log = recipe(tmp_path, digits, **BLOCKS, **averaging), tmp_path / "log"
    assert Job(2, ["train", str(config)], log=log, environment=LAUNCHED["fsdp"]).wait() == [2, 2], log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if "error:" in line]
    assert "objective.historical_averaging.generator: keeps a second copy of all weights" in line
    assert "launch with --multi_gpu" in line
