"""distgan from a program: what `train` returns and calls, networks of the program's own, and runs one after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml

import distgan
from distgan.errors import UserError
from tests.notebooks import cells
from tests.ranks import free_port
from tests.runs import recipe, rows, tensors


def test_the_result_of_a_run(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))
    config = recipe(tmp_path, digits, training={"steps": 4}, evaluation={"every": 2, "num_samples": 32})
    steps, checkpoints, evaluations = [], [], {}

    def on_evaluation(step: int, metrics: Mapping[str, float]) -> None:
        evaluations[step] = dict(metrics)

    calls = distgan.Callbacks(steps.append, on_evaluation, checkpoints.append)
    run = distgan.train(distgan.load_config(config), callbacks=calls)
    assert (run.outcome, run.step, run.reason) == ("finished", 4, None)
    assert steps == [1, 2, 3, 4]
    assert evaluations.keys() == {0, 2, 4}
    assert set(checkpoints) >= {2, 4}
    assert run.curves == rows(tmp_path / "run")
    assert [row["fid[classifier]"] for row in run.curves if row["step"] == 2] == [evaluations[2]["fid[classifier]"]]
    assert run.best is not None
    assert run.best["value"] == min(metrics["fid[classifier]"] for metrics in evaluations.values())
    generator = run.generator()
    assert generator(generator.latents(2)).shape == (2, 1, 16, 16)
    again = distgan.train(distgan.load_config(config, ["training.steps=6"]))
    assert (again.outcome, again.step) == ("finished", 6)


def test_an_exception_in_a_callback_names_it(tmp_path: Path, digits: Path) -> None:
    def on_step(step: int) -> None:
        if step == 2:
            raise KeyError("mine")

    with pytest.raises(RuntimeError, match="on_step failed at step 2: KeyError: 'mine'"):
        distgan.train(distgan.load_config(recipe(tmp_path, digits)), callbacks=distgan.Callbacks(on_step))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["outcome"] == "failed"
    assert "on_step" in status["reason"]


GENERATOR = """
class Generator(nn.Module):
    def __init__(self, shape, latent_size, hidden=8):
        super().__init__()
        self.shape = shape
        self.layers = nn.Sequential(nn.Linear(latent_size, hidden), nn.ReLU(), nn.Linear(hidden, 256), nn.Tanh())

    def forward(self, latents, labels):
        return self.layers(latents).view(-1, *self.shape.sizes)
"""

SCRIPT = (
    """
import sys
import distgan
from torch import nn

"""
    + GENERATOR
    + """
if __name__ == "__main__":
    values = distgan.load_config(sys.argv[1]).model_dump()
    values["generator"] = {"architecture": Generator, "hidden": 16, "latent_size": 8}
    run = distgan.train(distgan.Config.model_validate(values))
    print(run.outcome, tuple(run.generator()(run.generator().latents(2)).shape))
"""
)


NOTEBOOK = (
    """
import sys
import distgan
import distgan.errors
import torch
from torch import nn
from torchmetrics import Metric

"""
    + GENERATOR
    + """
class Mean(Metric):
    higher_is_better = True
    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
    def update(self, images):
        self.total += images.float().mean()
    def compute(self):
        return self.total

def train(steps):
    config = distgan.load_config(sys.argv[1], [f"training.steps={steps}", "data.num_workers=1"])
    values = config.model_dump() | {"generator": {"architecture": Generator, "latent_size": 8}}
    values["evaluation"] |= {"metrics": [Mean], "every": 1, "num_samples": 4}
    try:
        print(distgan.train(distgan.Config.model_validate(values)).step)
    except distgan.errors.UserError as error:
        print(error)
"""
)


def test_classes_of_a_notebook(tmp_path: Path, digits: Path) -> None:
    """In a `__main__` without a file: loaders start, runs resume, and a definition that changed is noticed."""
    config, run = recipe(tmp_path, digits), tmp_path / "run"
    changed = (
        "class Generator(Generator):\n    def forward(self, latents, labels): return -super().forward(latents, labels)"
    )
    said = cells(NOTEBOOK, "train(1); train(2)", changed, "train(3)", arguments=[str(config)])
    assert said[:2] == ["1", "2"]
    assert "saved with other sources of __main__, the notebook or script" in said[2]
    assert "--accept code" in said[2]
    assert cells(NOTEBOOK, "train(3)", f"print(distgan.load_generator({str(run)!r}).shape.channels)",
                 arguments=[str(config)]) == ["3", "1"]  # fmt: skip
    with pytest.raises(UserError, match="__main__:Generator: it was defined in a notebook or script") as caught:
        distgan.load_generator(run, trust_code=["__main__"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_network_of_the_program_itself(tmp_path: Path, digits: Path, world_size: int) -> None:
    """A class of the script, which has no package; resumed bitwise, on one rank and on two."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    for folder, parts in (("whole", [4]), ("parts", [2, 4])):
        for steps in parts:
            config = recipe(tmp_path, digits, training={"steps": steps})
            values = {**yaml.safe_load(config.read_text()), "run_dir": str(tmp_path / folder)}
            config.write_text(yaml.safe_dump(values))
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size),
                           "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(free_port())}  # fmt: skip
            if world_size == 1:
                del environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]
            ranks = [
                subprocess.Popen(
                    [sys.executable, str(script), str(config)], text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else environment,
                )
                for rank in range(world_size)
            ]  # fmt: skip
            for process in ranks:
                said, complaint = process.communicate(timeout=120)
                assert process.returncode == 0, complaint
                assert said.splitlines()[-1] == "finished (2, 1, 16, 16)"
    found, expected = tensors(tmp_path / "parts", 4), tensors(tmp_path / "whole", 4)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
