from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distgan import cli

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(cli, "leave", leave)  # under a launcher it would end this very process
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("distgan: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--steps", "0:1", "--world-size", "0"], "--world-size 0"),
        (["--steps", "0:1", "--world-size", "-1"], "--world-size -1"),
        (["--steps", "0:²"], "--steps 0:²"),
        (["--steps", "0:99999999999999999999"], "A < B < 2**40"),
        (["--steps", f"0:{2**40}"], "A < B < 2**40"),
        (["--steps", "0:" + "9" * 5000], "A < B < 2**40"),
        (["--steps", "3:3"], "A < B < 2**40"),
    ],
)
def test_impossible_traces(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "run_dir": "r", "data": {"path": str(digits), "resolution": 16}, "training": {"steps": 1, "batch_size": 8},
    }))  # fmt: skip
    assert part in mistake(capsys, "trace", str(recipe), *arguments)


@pytest.mark.parametrize(
    "arguments", [["pack", "", "x"], ["pack", "builtin:digits", ""], ["export", "x", ""], ["sample", "x", "--out", ""]]
)
def test_empty_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "empty" in mistake(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='2'"),
        ({"RANK": "3", "LOCAL_RANK": "3"}, "none.yaml: cannot read"),
        ({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "1"}, "none.yaml: cannot read"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_environments_of_no_launcher(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    part: str,
    command: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if command == "train" or "yaml" not in part:
        assert part in mistake(capsys, command, "none.yaml")


def test_only_the_first_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in zip(LAUNCHER, ("2", "1", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "none.yaml"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "distgan", "schema"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "distgan: error: cannot write to the standard output: No space left on device\n"
