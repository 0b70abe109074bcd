"""Whole runs on a GPU: their losses against the CPU's, a kill and a resume, and a lack of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distgan.config import load_config
from distgan.distributed.runtime import Runtime
from distgan.training.setup import uses_channels_last
from tests.distributed.test_stragglers import train_alone
from tests.end_to_end.test_compile import train_compiled
from tests.ranks import Job, RankPool
from tests.runs import differing, losses, recipe, status, tensors, wait_for_rows

pytestmark = pytest.mark.gpu

STEPS = 6
SECTIONS: dict[str, Any] = {
    "data": {"channels": 3},
    "generator": {"width": 16},
    "discriminator": {"width": 16},
    "training": {"steps": STEPS, "deterministic": False},
}


def test_a_killed_run_ends_bitwise_as_another(tmp_path: Path, digits: Path) -> None:
    """SIGKILL in the middle, with bf16 and a lazy penalty; everything that a checkpoint holds at the end."""
    sections = {**SECTIONS, "training": {"steps": 16, "mixed_precision": "bf16"}, "monitoring": {"every": 1}}
    config = recipe(tmp_path, digits, **sections)
    assert Job(1, ["train", str(config), f"run_dir={tmp_path / 'whole'}"]).wait() == [0]
    job = Job(1, ["train", str(config)])
    wait_for_rows(tmp_path / "run", job, 5)
    job.kill()
    assert status(tmp_path / "run")["outcome"] == "running"
    assert Job(1, ["train", str(config)]).wait() == [0]
    assert differing(tensors(tmp_path / "run", 16), tensors(tmp_path / "whole", 16)) == []


LITTLE_MEMORY = """
import sys, torch
from distgan.cli import main
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / total)
else:
    def refuse(*_):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB.")
    torch.nn.Conv2d.forward = refuse
main(sys.argv[1:])
"""


def test_a_lack_of_memory_is_one_line(tmp_path: Path, digits: Path, device: torch.device) -> None:
    config = recipe(tmp_path, digits, discriminator={"width": 128}, training={"batch_size": 1024})
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, "train", str(config)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "distgan: error:" in line]
    assert len(said) == 1
    assert "training.batch_size = 1024" in said[0]
    assert "out of memory" in said[0]
    assert "Traceback" not in done.stderr
    assert status(tmp_path / "run")["outcome"] == "failed"
    assert "training.batch_size = 1024" in status(tmp_path / "run")["reason"]


def test_the_runtime_works_on_the_device(device: torch.device) -> None:
    """And float32 is that: TF32 would round every product to 10 bits."""
    assert Runtime().device.type == device.type
    left, right = (torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = (left.to(device) @ right.T.to(device)).cpu()
    torch.testing.assert_close(found, left @ right.T, rtol=1e-5, atol=1e-4)
    images, kernels = left.view(4, 64, 8, 8), right.view(64, 64, 2, 2)
    convolved = torch.conv2d(images.to(device), kernels.to(device)).cpu()
    torch.testing.assert_close(convolved, torch.conv2d(images, kernels), rtol=1e-5, atol=2e-4)


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[int, dict[str, float]]:
    """Losses of the run that all others here are compared with: float32, eager, one process, no GPU."""
    folder = tmp_path_factory.mktemp("cpu")
    config = recipe(folder, digits, **SECTIONS)
    assert Job(1, ["train", str(config)], environment={"CUDA_VISIBLE_DEVICES": ""}).wait() == [0]
    return losses(folder / "run")


@pytest.mark.parametrize(
    ("world_size", "changes", "rel"),
    [
        pytest.param(1, {}, 1e-2, id="float32"),
        pytest.param(2, {}, 1e-2, id="two ranks sharing the device"),
        pytest.param(1, {"channels_last": False}, 1e-2, id="contiguous"),
        pytest.param(1, {"mixed_precision": "bf16"}, 0.25, id="bf16"),
        pytest.param(1, {"compile": True}, 1e-2, id="compiled"),
    ],
)
def test_losses_are_the_cpus(
    tmp_path: Path, digits: Path, ranks: RankPool, device: torch.device, on_the_cpu: dict[int, dict[str, float]],
    world_size: int, changes: dict[str, Any], rel: float,
) -> None:  # fmt: skip
    config = str(recipe(tmp_path, digits, **{**SECTIONS, "training": SECTIONS["training"] | changes}))
    if changes.get("compile"):
        # On the CPU the compiler itself, which takes a minute there, is another test's.
        (graphs,) = ranks.run(1, train_compiled, config, "inductor" if device.type == "cuda" else "aot_eager")
        assert graphs >= 2
    else:
        ranks.run(world_size, train_alone, config)
    found = losses(tmp_path / "run")
    assert found.keys() == on_the_cpu.keys() == {3, 6}
    for step, row in on_the_cpu.items():
        assert found[step] == pytest.approx(row, rel=rel, abs=rel / 10)
    if "mixed_precision" in changes:
        assert found != on_the_cpu, "bfloat16 must show in the last digits"
    if changes == {}:
        assert uses_channels_last(load_config(config), device) == (device.type == "cuda")
