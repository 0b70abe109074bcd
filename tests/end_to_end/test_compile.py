"""Compiled networks train as the ones they were compiled from do: across ranks, with a penalty, through a resume."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from distgan.config import load_config
from distgan.training.loop import train
from tests.ranks import Job, RankPool
from tests.runs import differing, losses, recipe, tensors

STEPS = 6
COMPILED = {"steps": STEPS, "compile": True}


def train_compiled(config: str, backend: str) -> int:
    """Train with networks compiled by this backend; how many graphs it was given."""
    counter: Any = CompileCounterWithBackend(backend)
    patch = pytest.MonkeyPatch()
    patch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=counter))
    torch.compiler.reset()
    try:
        train(load_config(config))
    finally:
        patch.undo()
        torch.compiler.reset()
    return int(counter.frame_count)


def train_eagerly(config: str, run: str) -> None:
    train(load_config(config, ["training.compile=false", f"run_dir={run}"]))


def test_compiled_networks_learn_the_same(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    """Two backends of one graph differ by the order of float32 sums, which Adam's first steps amplify."""
    config = str(recipe(tmp_path, digits, training=COMPILED))
    graphs = ranks.run(2, train_compiled, config, "aot_eager")
    # The generator, and the discriminator, at the least: neither falls back to eager as a whole.
    assert min(graphs) >= 2
    ranks.run(2, train_eagerly, config, str(tmp_path / "eager"))
    compiled, eager = losses(tmp_path / "run"), losses(tmp_path / "eager")
    assert compiled.keys() == eager.keys() == {3, 6}
    for step, row in eager.items():
        assert compiled[step] == pytest.approx(row, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, with which torch.compile builds for CPUs")
def test_compiled_by_inductor_and_resumed(tmp_path: Path, digits: Path) -> None:
    config = str(recipe(tmp_path, digits, training=COMPILED))
    assert Job(2, ["train", config, f"run_dir={tmp_path / 'whole'}"]).wait(600) == [0, 0]
    assert Job(2, ["train", config, "training.compile=false", f"run_dir={tmp_path / 'eager'}"]).wait() == [0, 0]
    for steps in (4, STEPS):
        assert Job(2, ["train", config, f"training.steps={steps}"]).wait(600) == [0, 0]
    assert differing(tensors(tmp_path / "run", STEPS), tensors(tmp_path / "whole", STEPS)) == []
    for step, row in losses(tmp_path / "eager").items():
        assert losses(tmp_path / "whole")[step] == pytest.approx(row, rel=1e-3, abs=1e-4)
