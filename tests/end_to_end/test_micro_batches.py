"""`training.gradient_accumulation_steps: auto`, with a network that finds no memory for more than some samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distgan import extensions
from distgan.checkpoint.contents import load_description
from distgan.cli import main
from distgan.config import load_config
from distgan.errors import MicroBatchMemoryError, UserError
from distgan.training import setup
from distgan.training.loop import train
from distgan.training.micro_batches import trials
from distgan.training.micro_batches.memory import exhausted_settings, failed_accumulation, with_accumulation
from distgan.training.monitor import Monitor
from distgan.training.result import Callbacks
from distgan.training.trace import trace
from tests.engines import LAUNCHED, needs, under
from tests.ranks import Job, RankPool
from tests.runs import differing, losses, recipe, status, tensors

PLUGINS = Path(__file__).parents[1] / "plugins"
AUTO: dict[str, Any] = {"steps": 2, "batch_size": 24, "critic_steps": 1, "gradient_accumulation_steps": "auto"}
KEY = "training.gradient_accumulation_steps"


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setattr(extensions, "_packages", set())
    monkeypatch.setattr(extensions, "_paths", set())


def config_of(folder: Path, shards: Path, *, training: dict[str, Any] = AUTO, **options: Any) -> str:
    discriminator = {"architecture": "lab.memory:Discriminator", **options}
    networks = {"generator": {"normalization": "layer"}, "discriminator": discriminator}
    path = recipe(folder, shards, training=training, monitoring={"every": 1}, **networks)
    return str(path)


def run(config: str, overrides: list[str], engine: str = "ddp") -> str:
    """Train as one of the ranks. Return the outcome."""
    sys.path.insert(0, str(PLUGINS))
    extensions.allow("lab")
    try:
        return under(LAUNCHED[engine], lambda: train(load_config(config, overrides)).outcome)
    finally:
        sys.path.remove(str(PLUGINS))


def recorded(folder: Path, step: int) -> int | None:
    return load_description(folder / "checkpoints" / f"step-{step:08d}").accumulation


@pytest.mark.parametrize("engine", ["ddp", needs("zero2"), needs("fsdp")])
def test_a_run_finds_its_largest_micro_batch(tmp_path: Path, digits: Path, ranks: RankPool, engine: str) -> None:
    """24 samples on 2 ranks with memory for 10: of 12, 6, 4, 3, 2 and 1, 4 reals and 4 fakes are the most that fit.

    Nothing is left of the trials: the run is bitwise the one with that number in its config, and so is its resume.
    """
    config = config_of(tmp_path, digits, limit=10)
    ample = "discriminator.limit=100"  # the resume does not look for another number
    for number, parts in (("auto", [["training.steps=2"], ["training.steps=4", ample]]), ("3", [["training.steps=4"]])):
        for changes in parts:
            overrides = [f"{KEY}={number}", f"run_dir={tmp_path / number}", *changes]
            assert ranks.run(2, run, config, overrides, engine) == ["finished"] * 2
    assert recorded(tmp_path / "auto", 2) == recorded(tmp_path / "auto", 4) == 3
    found, expected = (tensors(tmp_path / number, 4) for number in ("auto", "3"))
    assert differing(found, expected) == []
    assert losses(tmp_path / "auto") == losses(tmp_path / "3")


def test_one_rank_has_less_memory_than_another(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    config = config_of(tmp_path, digits, limit=14, rank=1)
    extensions.allow("lab")
    auto, fixed = (load_config(config, overrides) for overrides in ([], [f"{KEY}=2"]))
    before = list(trace(auto, 0, 2, 2))
    ranks.run(2, run, config, [])
    assert recorded(tmp_path / "run", 2) == 2
    # The trace follows. Samples are on other ranks, but in the same order.
    after = list(trace(auto, 0, 2, 2))
    assert after == list(trace(fixed, 0, 2, 2)) != before
    samples = [sorted(json.dumps({**record, "rank": 0}) for record in records) for records in (before, after)]
    assert samples[0] == samples[1]
    # On another number of ranks, the number is found anew: one rank, which has no limit.
    ranks.run(1, run, config, ["training.steps=4"])
    assert recorded(tmp_path / "run", 4) == 1


def test_a_restart_after_a_lack_of_memory_halves_the_micro_batches(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 finds no memory in step 3, some passes after the trials; the launcher then starts all ranks again."""
    config, log = config_of(tmp_path, digits, limit=12, rank=1, passes=40), tmp_path / "log"
    command = ["train", config, "--allow", "lab", "training.steps=30"]
    assert sorted(Job(2, command, log=log).wait()) == [1, 2]
    lines = [line for line in log.read_text().splitlines() if "error" in line or "lost contact" in line]
    assert len(lines) == 1
    assert "out of memory: training.gradient_accumulation_steps = auto, with 1 micro-batch of 12 samples" in lines[0]
    ended = status(tmp_path / "run")
    assert (ended["outcome"], ended["out_of_memory"], ended["lost_rank"]) == ("failed", 1, False)
    assert ended["reason"].startswith("rank 1: out of memory: ")
    main(["status", config])
    outcome, step, reason = capsys.readouterr().out.split(maxsplit=2)
    assert (outcome, reason) == ("out-of-memory", ended["reason"] + "\n")
    assert int(step) >= 2

    again = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert Job(2, command, log=log, environment=again).wait() == [0, 0], log.read_text()
    assert recorded(tmp_path / "run", 30) == 2
    assert "2 micro-batches of 6 samples per process (memory ran out with 1)" in log.read_text()
    assert status(tmp_path / "run")["out_of_memory"] is None


def test_a_lack_of_memory_counts_until_a_checkpoint_has_more_micro_batches(tmp_path: Path, digits: Path) -> None:
    """One rank: 24 samples do not fit after the trials, and the next attempt dies before its first checkpoint."""
    training = {**AUTO, "steps": 30}
    config, ample = config_of(tmp_path, digits, training=training, limit=12, passes=40), "discriminator.limit=100"
    extensions.allow("lab")
    with pytest.raises(MicroBatchMemoryError, match="with 1 micro-batch of 24 samples"):
        train(load_config(config, ["checkpoint.every=100"]))
    assert recorded_failure(tmp_path) == (1, 1)

    def die(step: int, _: object = None) -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        train(load_config(config, [ample]), callbacks=Callbacks(on_step=die))
    assert recorded_failure(tmp_path) == (None, 1)
    train(load_config(config, [ample, "training.steps=2"]))
    assert recorded(tmp_path / "run", 2) == 2
    train(load_config(config, [ample, "training.steps=2"]), resume="never")
    assert recorded(tmp_path / "run", 2) == 1
    assert status(tmp_path / "run")["exhausted"] is None


@pytest.mark.parametrize("change", ["batch_size=12", "generator_batch_size=12", "mixed_precision=bf16"])
def test_a_lack_of_memory_counts_for_its_settings_only(tmp_path: Path, digits: Path, change: str) -> None:
    path = config_of(tmp_path, digits, limit=100)
    extensions.allow("lab")
    exhausted = json.loads(json.dumps(exhausted_settings(with_accumulation(load_config(path), 2), 2)))
    assert failed_accumulation(load_config(path), 2, exhausted) == 2
    assert failed_accumulation(load_config(path), 4, exhausted) == 0
    assert failed_accumulation(load_config(path, [f"training.{change}"]), 2, exhausted) == 0
    assert failed_accumulation(load_config(path), 2, None) == 0


def recorded_failure(folder: Path) -> tuple[int | None, int]:
    ended = status(folder / "run")
    return ended["out_of_memory"], ended["exhausted"]["micro_batches"]


def test_only_updates_ask_for_smaller_micro_batches(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Monitor, "_draw_samples", fail)
    extensions.allow("lab")
    with pytest.raises(
        UserError, match=r"^evaluation\.batch_size = .*, monitoring\.num_samples = .*2\.00 GiB"
    ) as caught:
        train(load_config(config_of(tmp_path, digits, limit=100)))
    assert not isinstance(caught.value, MicroBatchMemoryError)
    assert status(tmp_path / "run")["out_of_memory"] is None


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"discriminator": {"dropout": 0.1}}, ["dropout", "set a number"]),
        (
            {"discriminator": {"architecture": "dcgan", "normalization": "none", "spectral_norm": True}},
            ["spectral norm"],
        ),
        ({"generator": {"normalization": "synchronized"}}, ["generator.normalization", "statistics"]),
        ({"generator": {"normalization": "virtual"}}, ["generator.normalization", "statistics"]),
        ({"objective": {"feature_matching": {"weight": 1.0}}}, ["objective.feature_matching", "statistics"]),
        ({"discriminator": {"limit": 0, "passes": 8}, "objective": {"r1": None}}, ["even for 24 micro-batches of 1"]),
    ],
)
def test_refused_where_the_objective_depends_on_the_cut(
    tmp_path: Path, digits: Path, change: dict[str, Any], parts: list[str]
) -> None:
    networks = {
        "generator": {"normalization": "layer"},
        "discriminator": {"architecture": "lab.memory:Discriminator", "limit": 2**20},
    }
    if "architecture" in change.get("discriminator", {}):
        del networks["discriminator"]
    merged = {name: {**networks.get(name, {}), **change.get(name, {})} for name in {**networks, **change}}
    extensions.allow("lab")
    with pytest.raises(UserError) as caught:
        train(load_config(recipe(tmp_path, digits, training=AUTO, **merged)))
    text = str(caught.value)
    assert text.startswith("training.gradient_accumulation_steps = auto: ")
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert status(tmp_path / "run")["outcome"] == "failed"


def test_the_checkpoint_is_checked_before_the_trials_and_warnings_come_once(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(setup, "check_finite_differences", lambda *_: ["a penalty is inaccurate"])
    config = config_of(tmp_path, digits, limit=12)
    extensions.allow("lab")
    assert train(load_config(config)).step == 2
    assert recorded(tmp_path / "run", 2) == 4, "of 6 reals and 6 fakes, after several trials"
    assert caplog.text.count("a penalty is inaccurate") == 1

    def refuse(*_: object) -> None:
        raise AssertionError("a trial ran")

    monkeypatch.setattr(trials, "_runs_out", refuse)
    changed = "training.generator_batch_size=12"  # so that the checkpoint's number is not taken
    for change, said in (("seed=8", "--accept seed"), ("generator.latent_size=5", "found torch.float32")):
        with pytest.raises(UserError, match=said):
            train(load_config(config, [changed, change]), accept=["batch"])
    with pytest.raises(AssertionError, match="a trial ran"):
        train(load_config(config, [changed, "seed=8"]), accept=["seed", "batch"])
