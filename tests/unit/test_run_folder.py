"""How a run starts in its folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distgan.checkpoint.directory import Best, read_best
from distgan.checkpoint.writer import CheckpointWriter
from distgan.config import Config, parse_config
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.training.resume import resume_run
from tests.ranks import RankPool


def started(config: Config, resume: str = "auto", *, best: int) -> dict[str, Any] | None:
    """Resume at step 4, where the checkpoint says that the best average so far was that of step `best`.

    Returns what the best is held to be then.
    """
    then = SimpleNamespace(
        versions={},
        step=4,
        best=Best(metric="fid", value=3.0, step=best),
        world_size=1,
        config=config.model_dump(mode="json"),
    )
    progress = SimpleNamespace(position=64, images=64, best=then.best.model_dump())
    state: Any = SimpleNamespace(load=lambda path, accept: then, progress=progress)
    resume_run(config, state, Runtime(), resume, frozenset())
    found: dict[str, Any] | None = progress.best
    return found


def killed_before_marking(run: Path) -> Config:
    """A run whose checkpoint of step 2 is marked the best, with one of step 4 after it."""
    with closing(CheckpointWriter(run / "checkpoints", keep=3)) as writer:
        for step in (2, 4):
            assert writer.save(step, {"generator": {"weight": torch.zeros(2)}}, {}, blocking=True)
            if step == 2:
                assert writer.mark_best(2, 5.0, "fid")
    return parse_config(
        {"run_dir": str(run), "data": {"path": "unused", "resolution": 16}, "training": {"steps": 9, "batch_size": 2}}
    )


def marked(run: Path) -> int:
    best = read_best(run / "checkpoints")
    assert best is not None
    return best.step


def test_a_best_checkpoint_that_a_kill_left_unmarked_is_marked(tmp_path: Path) -> None:
    config = killed_before_marking(tmp_path / "run")
    started(config, best=2)
    assert marked(tmp_path / "run") == 2
    started(config, best=4)
    assert marked(tmp_path / "run") == 4


def test_a_run_that_another_starts_from_is_left_as_it_is(tmp_path: Path) -> None:
    killed_before_marking(tmp_path / "other")
    config = killed_before_marking(tmp_path / "run")
    started(config, str(tmp_path / "other"), best=4)
    assert marked(tmp_path / "other") == 2


def resume_where_one_cannot_read(config: Config) -> str:
    """Start on two ranks, of which the second does not see what the first does."""
    runtime = Runtime()

    def load(path: Path, accept: frozenset[str]) -> None:
        raise UserError(f"{path.name}: cannot be read")

    then = SimpleNamespace(step=4, best=None, world_size=2, versions={}, config=config.model_dump(mode="json"))
    progress = SimpleNamespace(position=64, images=64, best={"metric": "fid", "value": 3.0, "step": 2})
    state: Any = SimpleNamespace(load=load if runtime.rank else lambda path, accept: then, progress=progress)
    try:
        with runtime.raise_on_all_ranks():
            resume_run(config, state, runtime, "auto", frozenset())
    except UserError as error:
        return str(error)
    return "resumed"


def test_a_rank_that_cannot_read_the_checkpoint_is_told_by_all(tmp_path: Path, ranks: RankPool) -> None:
    config = killed_before_marking(tmp_path / "run")
    assert ranks.run(2, resume_where_one_cannot_read, config) == ["rank 1: step-00000004: cannot be read"] * 2


def test_the_best_so_far_is_one_that_is_kept(tmp_path: Path) -> None:
    config = killed_before_marking(tmp_path / "run")
    kept = started(config, best=2)
    assert kept is not None
    assert kept["step"] == 2
    # Of a course that was set aside or pruned, or of another run, it would be measured by what is not there.
    assert started(config, best=3) is None
    killed_before_marking(tmp_path / "other")
    assert started(config, str(tmp_path / "other"), best=2) is None
