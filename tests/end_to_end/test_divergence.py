"""Runs that diverge for good: they stop, or go back to their best checkpoint, which a kill does not change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import distgan
from distgan.data.packing.pack import pack
from distgan.randomness import branch_seed
from distgan.training import loop
from distgan.training.trace import trace
from tests.engines import LAUNCHED, needs, under
from tests.ranks import Job, RankPool
from tests.runs import differing, losses, rows, status, tensors

PLUGINS = str(Path(__file__).parents[1] / "plugins")
STEPS, BACK_AT, BEST = 12, 10, 4
"""The metric improves up to step 4 and is ten times worse after it, so that the third bad evaluation is at step 10."""


def recipe(folder: Path, shards: Path, *, bad: int = 1, guard: Any = "rollback", **sections: Any) -> Path:
    network = {"architecture": "mlp", "normalization": "none", "width": 8, "depth": 3}
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "seed": 5,
        "data": {"kind": "points", "path": str(shards), "num_workers": 0, "labels": False},
        "generator": {**network, "latent_size": 4},
        "discriminator": network,
        "objective": {"adversarial": "wasserstein", "gradient_penalty": {}},
        "training": {
            "steps": STEPS, "batch_size": 8, "critic_steps": 1, "deterministic": True, "on_divergence": guard,
            **sections.pop("training", {}),
        },
        "checkpoint": {"every": 3, "keep": 100},
        "monitoring": {"every": 1, "samples_every": 100, "num_samples": 4},
        "evaluation": {"every": 2, "num_samples": 8, "batch_size": 8, "cache_dir": str(folder / "cache"),
                       "metrics": [{"metric": "lab.metrics:Course", "until": BEST, "bad": bad}]},
        **sections,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def train(config: Path, *overrides: str, resume: str = "auto", accept: tuple[str, ...] = ()) -> tuple[str, int]:
    if PLUGINS not in sys.path:
        sys.path.insert(0, PLUGINS)
    run = distgan.train(distgan.load_config(config, overrides), resume=resume, accept=accept)
    return run.outcome, run.step


def end_after(steps: int, *, kill: bool = True) -> None:
    """Make this process kill itself, or crash, in place of the step after so many."""
    sys.path.insert(0, PLUGINS)
    done, step = [0], loop.train_step

    def counted(*arguments: Any, **options: Any) -> None:
        if done[0] == steps:
            loop.train_step = step
            if not kill:
                raise RuntimeError("a crash")
            os.kill(os.getpid(), signal.SIGKILL)
        step(*arguments, **options)
        done[0] += 1

    loop.train_step = counted


def crash_after(steps: int, config: Path) -> str:
    end_after(steps, kill=False)
    with pytest.raises(RuntimeError) as error:
        train(config)
    return str(error.value)


def description(run: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text()))


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points") / "shards"
    pack("builtin:ring", folder, points=200, workers=1)
    return folder


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory, shards: Path, ranks: RankPool) -> Path:
    """The folder of a run on two ranks that went back once and finished."""
    folder = tmp_path_factory.mktemp("rolled_back")
    assert ranks.run(2, train, recipe(folder, shards)) == [("finished", STEPS)] * 2
    return folder


def test_a_run_goes_back_once_and_says_so(rolled_back: Path) -> None:
    run = rolled_back / "run"
    assert status(run)["outcome"] == "finished"
    assert status(run)["reason"] == f"rolled back to step {BEST} (training.on_divergence)"
    # The curve has each step once; what was given up is set aside, with its checkpoints.
    found = rows(run)
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    assert [row["progress/rollbacks"] for row in found[1:]] == [0] * BEST + [1] * (STEPS - BEST)
    given_up = rows(run / "previous-1")
    assert [row["step"] for row in given_up] == list(range(BACK_AT + 1))
    assert [row["Course"] for row in given_up if row["step"] > BEST and "Course" in row] == [10.0] * 3
    assert steps_of(run / "previous-1") == [6, 9]
    assert steps_of(run) == [0, 2, 3, 4, 6, 8, 9, 10, 12]
    assert description(run, STEPS)["rollbacks"] == description(run, BEST)["rollbacks"] == [BEST]
    assert description(run, 3)["rollbacks"] == []
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    told = f"step {BACK_AT}: Course diverged: 10 at step {BACK_AT}, best 0.2; worse by a factor of 2 in 3 evaluations"
    assert told.encode() in events


def test_what_follows_is_what_another_seed_draws_from_the_best_checkpoint(
    rolled_back: Path, tmp_path: Path, shards: Path, ranks: RankPool
) -> None:
    """The control resumes from the checkpoint of a run that was stopped there, with the seed of the first rollback."""
    config = recipe(tmp_path, shards, guard=None, bad=0)
    assert ranks.run(2, train, config, f"training.steps={BEST}") == [("finished", BEST)] * 2
    seed = f"seed={branch_seed(5, 1)}"
    assert ranks.run(2, train, config, seed, accept=("seed",)) == [("finished", STEPS)] * 2
    assert differing(tensors(rolled_back / "run", STEPS), tensors(tmp_path / "run", STEPS)) == []
    sys.path.insert(0, PLUGINS)
    told = list(trace(distgan.load_config(rolled_back / "recipe.yaml"), 0, STEPS, 2))
    before = list(trace(distgan.load_config(config), 0, BEST, 2))
    assert told == before + list(trace(distgan.load_config(config, [seed]), BEST, STEPS, 2))
    other = [list(trace(distgan.load_config(folder / "recipe.yaml", ["seed=6"]), 0, STEPS, 2))
             for folder in (rolled_back, tmp_path)]  # fmt: skip
    assert other[0] == other[1]  # the run folder is that of another seed


def test_killed_after_the_rollback_and_resumed_is_bitwise_the_same(
    tmp_path: Path, shards: Path, ranks: RankPool
) -> None:
    """One step after the first checkpoint that follows the rollback: instead of the 14th step."""
    config, run, whole = recipe(tmp_path, shards), tmp_path / "run", tmp_path / "whole"
    assert Job(1, ["train", str(config)], before=partial(end_after, 13)).wait() == [-signal.SIGKILL]
    assert status(run)["outcome"] == "running"
    assert f"rollback 1 of 3 to step {BEST}, with other samples and noise" in status(run)["reason"]
    assert steps_of(run)[-1] == 6
    assert ranks.run(1, train, config) == ranks.run(1, train, config, f"run_dir={whole}") == [("finished", STEPS)]
    assert differing(tensors(whole, STEPS), tensors(run, STEPS)) == []
    assert losses(run) == losses(whole)


def test_a_crash_before_the_first_step_after_the_rollback(
    rolled_back: Path, tmp_path: Path, shards: Path, ranks: RankPool
) -> None:
    """The rollback is on disk, and is not made again."""
    config, run = recipe(tmp_path, shards), tmp_path / "run"
    assert ranks.run(2, crash_after, BACK_AT, config) == ["a crash"] * 2
    assert steps_of(run)[-1] == BEST
    assert description(run, BEST)["rollbacks"] == [BEST]
    assert ranks.run(2, train, config) == [("finished", STEPS)] * 2
    assert differing(tensors(rolled_back / "run", STEPS), tensors(run, STEPS)) == []
    assert len(list(run.glob("previous-*"))) == 1


def test_resumed_on_another_world_size_it_is_the_same_run(rolled_back: Path, tmp_path: Path, ranks: RankPool) -> None:
    shutil.copytree(rolled_back / "run", tmp_path / "run")
    config, place = rolled_back / "recipe.yaml", f"run_dir={tmp_path / 'run'}"
    again = str(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert ranks.run(1, train, config, place, resume=again) == [("finished", STEPS)]
    for step, values in losses(rolled_back / "run").items():
        assert losses(tmp_path / "run")[step] == pytest.approx(values, rel=1e-4)


def train_and_watch(config: Path) -> tuple[str, int, list[bool]]:
    """Train, and return for each time that networks were built whether the last ones were still in memory then."""
    built: list[weakref.ref[Any]] = []
    alive, assemble = [], loop.assemble

    def watched(*arguments: Any) -> Any:
        alive.extend(network() is not None for network in built[-2:])
        state = assemble(*arguments)
        built.extend(weakref.ref(player.network) for player in state.players)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "assemble", watched)
        return (*train(config), alive)


@pytest.mark.parametrize("engine", [needs("ddp"), needs("zero2"), needs("fsdp")])
def test_engines_are_built_again_in_the_memory_of_the_old_ones(
    rolled_back: Path, tmp_path: Path, shards: Path, ranks: RankPool, engine: str
) -> None:
    config = recipe(tmp_path, shards)
    assert ranks.run(2, under, LAUNCHED[engine], train_and_watch, config) == [("finished", STEPS, [False, False])] * 2
    assert losses(tmp_path / "run").keys() == losses(rolled_back / "run").keys()
    for step, values in losses(rolled_back / "run").items():
        assert losses(tmp_path / "run")[step] == pytest.approx(values, rel=1e-3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_stops(tmp_path: Path, shards: Path, ranks: RankPool, world_size: int) -> None:
    """It is not a failure; started again, it ends at once, and started with a rollback, it goes back."""
    config, run = recipe(tmp_path, shards, guard="stop"), tmp_path / "run"
    for _ in range(2):
        assert ranks.run(world_size, train, config) == [("diverged", BACK_AT)] * world_size
        assert status(run)["outcome"] == "diverged"
        assert "best 0.2; worse by a factor of 2 in 3 evaluations in a row; cont" in status(run)["reason"]
        assert status(run)["reason"].endswith(f"--resume {run / 'checkpoints' / 'step-00000004'}")
        assert steps_of(run)[-1] == BACK_AT
    assert Job(1, ["status", str(run)], log=tmp_path / "log").wait() == [0]
    assert (tmp_path / "log").read_text().startswith(f"diverged {BACK_AT} step {BACK_AT}: Course diverged")
    if world_size == 2:
        assert ranks.run(2, train, config, "training.on_divergence=rollback") == [("finished", STEPS)] * 2
        assert steps_of(run / "previous-1") == [6, 9, 10]


def test_rollbacks_have_a_limit(tmp_path: Path, shards: Path, ranks: RankPool) -> None:
    config = recipe(tmp_path, shards, bad=9, guard={"action": "rollback", "patience": 1, "max_rollbacks": 2})
    for start in range(2):
        assert ranks.run(1, train, config) == [("diverged", 6)]
        assert status(tmp_path / "run")["reason"].endswith(
            "not rolled back again: training.on_divergence.max_rollbacks = 2"
        )
        assert description(tmp_path / "run", 6)["rollbacks"] == [BEST, BEST], start
    assert {path.name for path in (tmp_path / "run").glob("previous-*")} == {"previous-1", "previous-2"}
    # A checkpoint was due at step 6, but it was given up; that of the end is where the run stays.
    assert [steps_of(tmp_path / "run" / name) for name in ("previous-1", "previous-2")] == [[], []]
    # Each branch draws anew.
    branches = [losses(tmp_path / "run" / name)[5]["loss/discriminator"] for name in ("previous-1", "previous-2", ".")]
    assert len(set(branches)) == 3


def test_without_a_best_checkpoint_it_stops_and_says_why(tmp_path: Path, shards: Path, ranks: RankPool) -> None:
    metrics = [{"metric": "lab.metrics:Course", "until": BEST, "bad": 1, "finite": False}]
    config = recipe(tmp_path, shards, evaluation={"every": 2, "num_samples": 8, "metrics": metrics})
    assert ranks.run(1, train, config) == [("diverged", 4)]
    reason = status(tmp_path / "run")["reason"]
    assert "Course diverged: not finite at step 4, no finite value before" in reason
    assert reason.endswith("not rolled back, because there is no best checkpoint yet")


def test_updates_that_are_not_finite_go_back_too(tmp_path: Path, shards: Path, ranks: RankPool) -> None:
    """A learning rate that throws the weights out of float32's range; the guard's limit ends it."""
    network = {"architecture": "mlp", "normalization": "none", "width": 8, "depth": 3}
    config = recipe(
        tmp_path, shards, bad=0, guard={"action": "rollback", "max_rollbacks": 1}, training={"max_skipped_updates": 2},
        discriminator={**network, "optimizer": {"learning_rate": 1e30}},
    )  # fmt: skip
    ((outcome, step),) = set(ranks.run(2, train, config))
    assert outcome == "diverged"
    reason = status(tmp_path / "run")["reason"]
    assert reason.startswith(f"step {step}: 2 updates of the ")
    assert "a loss or gradient that is not finite" in reason
    assert reason.endswith("max_rollbacks = 1")
    assert len(list((tmp_path / "run").glob("previous-*"))) == 1


def test_without_a_guard_nothing_changes(rolled_back: Path, tmp_path: Path, shards: Path, ranks: RankPool) -> None:
    """Not even after a divergence; up to where the other run went back, both are the same."""
    config = recipe(tmp_path, shards, guard=None)
    assert ranks.run(2, train, config) == [("finished", STEPS)] * 2
    assert status(tmp_path / "run")["reason"] is None
    assert not any("progress/rollbacks" in row for row in rows(tmp_path / "run"))
    given_up = losses(rolled_back / "run" / "previous-1")
    assert {step: losses(tmp_path / "run")[step] for step in given_up} == given_up
