"""The examples for SkyPilot and Ray Train fit what their documentation declares, and start distgan as they should.

Both packages are too heavy for the tests. The SkyPilot schema below holds what its YAML reference says of the keys that
the example uses (version 0.14; its own schema accepts the example too). The stand-ins for Ray have the parameters of
Ray 2.60, with which the example has trained two ranks, and continued after one of them was killed.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

import distgan

ROOT = Path(__file__).parents[2]
TASK = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "workdir": {"type": "string"},
        "num_nodes": {"type": "integer"},
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "volumes": {"type": "object", "additionalProperties": {"type": "string"}},
        "file_mounts": {"type": "object"},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "string"},
                "use_spot": {"type": "boolean"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"type": "string"},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                        },
                    },
                },
            },
        },
    },
}


def task() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "skypilot" / "train.yaml").read_text())
    return loaded


def test_the_skypilot_task_fits_its_schema() -> None:
    jsonschema.validate(task(), TASK)
    for mistake in ({"numnodes": 2}, {"num_nodes": "2"}, {"resources": {"accelerator": "H100:8"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(task() | mistake, TASK)


@pytest.mark.parametrize(("standing", "code"), [("finished 9", 0), ("preempted 9 SIGTERM", 138), ("failed 9 oom", 42)])
def test_the_skypilot_task_starts_a_launcher_on_each_node(tmp_path: Path, standing: str, code: int) -> None:
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\n(echo "$@"; env) > {tmp_path}/said\n')
    (tmp_path / "distgan").write_text(f'#!/bin/bash\necho "{standing}"\n')
    for name in ("torchrun", "distgan"):
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "sky-managed-1",
    }  # fmt: skip
    result = subprocess.run(["bash", "-c", task()["run"]], cwd=ROOT, env=environment, capture_output=True)
    assert result.returncode == code
    # The job ends for good with any code but those on which it recovers.
    assert (code in task()["resources"]["job_recovery"]["recover_on_exit_codes"]) == (code == 138)
    command, *lines = (tmp_path / "said").read_text().splitlines()
    assert command == "-m distgan train configs/x.yaml run_dir=s3://bucket/runs/x"
    given = dict(line.split("=", 1) for line in lines if line.startswith("PET_"))
    assert given == {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_MAX_RESTARTS": "3", "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "10.0.0.1:29400", "PET_RDZV_ID": "sky-managed-1", "PET_LOCAL_ADDR": "10.0.0.2",
        "PET_RDZV_CONF": "is_host=0,read_timeout=600,join_timeout=600",
    }  # fmt: skip


@dataclass
class ScalingConfig:
    num_workers: int = 1
    use_gpu: bool = False


@dataclass
class FailureConfig:
    max_failures: int = 0


@dataclass
class RunConfig:
    name: str | None = None
    storage_path: str | None = None
    failure_config: FailureConfig | None = None


class TorchTrainer:
    made: TorchTrainer

    def __init__(
        self, train_loop_per_worker: Any, *, train_loop_config: dict[str, Any], scaling_config: Any, run_config: Any
    ) -> None:
        self.loop, self.config = train_loop_per_worker, train_loop_config
        self.scaling, self.run = scaling_config, run_config
        TorchTrainer.made = self

    def fit(self) -> None:
        self.loop(self.config)


def test_the_ray_entry_trains_on_each_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train, torch_train = ModuleType("ray.train"), ModuleType("ray.train.torch")
    for part in (ScalingConfig, FailureConfig, RunConfig):
        setattr(train, part.__name__, part)
    torch_train.TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
    for name, module in (("ray", ModuleType("ray")), ("ray.train", train), ("ray.train.torch", torch_train)):
        monkeypatch.setitem(sys.modules, name, module)
    trained: list[Any] = []
    monkeypatch.setattr(distgan, "train", trained.append)
    recipe = tmp_path / "x.yaml"
    recipe.write_text(
        "run_dir: runs/x\ndata: {path: datasets/x, resolution: 16}\ntraining: {steps: 9, batch_size: 16}\n"
    )
    monkeypatch.setattr(sys, "argv", ["train.py", str(recipe), "seed=3", "--workers", "16", "--storage", "/shared"])
    runpy.run_path(str(ROOT / "launch" / "ray" / "train.py"), run_name="__main__")
    made = TorchTrainer.made
    assert made.scaling == ScalingConfig(num_workers=16, use_gpu=True)
    assert made.run == RunConfig("distgan", "/shared", FailureConfig(3))
    [config] = trained
    assert (config.seed, config.training.steps) == (3, 9)
