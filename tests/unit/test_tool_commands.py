"""The command lines that the tools build: the command line of distgan accepts them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from distgan.cli.parser import parse
from tools import results, speed
from tools.commands import later_wins


def test_of_a_key_with_two_values_the_later_stays() -> None:
    assert later_wins("a.b=1", "a=2", "a.b=x=3") == ["a.b=x=3", "a=2"]


class Finished:
    """A process that has ended well."""

    returncode = 0

    def poll(self) -> int:
        return 0

    def wait(self) -> int:
        return 0


def distgan_arguments(command: list[str]) -> list[str]:
    return command[command.index("distgan") + 1 :]


def test_results_takes_overrides_of_what_it_sets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Finished:
        said.append(distgan_arguments(command))
        return Finished()

    def evaluate(*arguments: str) -> str:
        said.append([*arguments])
        return json.dumps({"step": 7, "fid[classifier]": 2.5})

    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(results.subprocess, "Popen", start)
    monkeypatch.setattr(results, "distgan", evaluate)
    recipe = results.Recipe(results.ROOT / "configs" / "digits-dcgan.yaml")
    recipe.run.mkdir()
    (recipe.run / "metrics.jsonl").write_text("")
    overrides = ["evaluation.every=5", "training.steps=1", "evaluation.metrics=[kid]"]
    results.train(recipe, argparse.Namespace(overrides=overrides, steps=2, minutes=1.0, processes=1))
    found = results.measure(recipe, overrides)
    train, measured = (parse(arguments).overrides for arguments in said)
    assert {"evaluation.every=5", "training.steps=2", f"run_dir={recipe.run}"} <= set(train)
    assert "evaluation.metrics=[kid]" in measured
    assert found == {"steps": 7, "fid[classifier]": 2.5}


def test_speed_takes_overrides_of_what_it_sets_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Finished:
        said.append(distgan_arguments(command))
        return Finished()

    monkeypatch.setattr(speed.subprocess, "Popen", start)
    monkeypatch.setattr(speed, "step_seconds", lambda _: 0.5)
    assert speed.alone("x.yaml", ["training.batch_size=16", "training.steps=9", "seed=3"], images=8) == 0.5
    (arguments,) = said
    assert {"training.batch_size=8", "training.steps=32", "seed=3"} <= set(parse(arguments).overrides)
