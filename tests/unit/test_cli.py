from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distgan import cli
from distgan.cli.parser import build_parser, parse

ROOT = Path(__file__).parents[2]
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
    "command",
    ["sample x --out", "sample x --interpolate 3 --out", "merge x --out", "average x --std 0.1 --out", "export x",
     "export x --format torch-export", "export x --push a/b", "encode x --encoder e --resolution 8"],
)  # fmt: skip
def test_a_url_is_no_folder_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--push" in command:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "config.json").touch()
    said = mistake(capsys, *command.split(), "s3://user:word@bucket/y")
    name = "--out" if command.endswith("--out") else "DEST"
    assert f"error: {name}: expected a local path, found a URL 's3://bucket/y'" in said
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT not set"),
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


def parsers() -> dict[str, argparse.ArgumentParser]:
    """All parsers by the words that lead to them."""
    top = build_parser()
    [commands] = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    return {"": top, **commands.choices}


@pytest.mark.parametrize("command", parsers())
def test_help_names_files_commands_and_options_that_there_are(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # or options are broken at their hyphens
    parser = parsers()[command]
    text = parser.format_help()
    files = re.findall(r"\b(?:configs|launch|docs|tools|tests)/[\w./-]*\w", text)
    assert [file for file in files if not (ROOT / file).exists()] == []
    lines = [line for line in text.splitlines() if re.match(r" +(distgan|accelerate|torchrun|srun) \S+ ", line)]
    for line in lines:
        words = shlex.split(line)
        start = words.index("distgan") if "distgan" in words else words.index("launch/slurm/node.sh")
        parse(words[start + 1 :])
    assert set(re.findall(r"`distgan (\w+)", text)) <= parsers().keys()
    prose = "\n".join(line for line in text.splitlines() if line not in lines)
    known = {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", prose.replace("\n", " "))) - known <= {"--rdzv-id"}, (
        "torchrun has this one"
    )
    if command in ("", "train", "doctor"):
        assert lines
        assert files


@pytest.mark.parametrize("command", parsers())
def test_a_command_alone_names_what_it_needs_and_no_more(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = [
        "/".join(action.option_strings) or str(action.metavar) for action in parsers()[command]._actions
        if (action.required if action.option_strings else action.nargs not in ("*", "?"))
    ]  # fmt: skip
    if not needed:
        return
    with pytest.raises(SystemExit) as caught:
        parse(command.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: the following arguments are required: {', '.join(needed)}\n")


def test_images_is_a_flag_of_encode() -> None:
    """And a list of sets of evaluate."""
    command = ["encode", "shards", "latents", "--encoder", "vae", "--resolution", "16"]
    assert parse([*command, "--images"]).images is True
    assert parse(command).images is False


def test_braces_that_a_shell_expanded_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data.path=0.tar", "data.path=1.tar"], ["data.path=0.tar", "--resume", "never", "data.path=1.tar"]):
        with pytest.raises(SystemExit) as caught:
            parse(["train", "a.yaml", *words])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert "data.path is given twice: 'data.path=0.tar' and 'data.path=1.tar'" in said
        assert "quote braces" in said
    assert parse(["train", "a.yaml", "seed=1", "seed=1"]).overrides == ["seed=1", "seed=1"]


@pytest.mark.parametrize("command", ["train", "pack", "schema"])
def test_an_unknown_option_shows_the_usage_of_its_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([command, *{"train": ["a"], "pack": ["a", "b"]}.get(command, []), "--zzz"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: distgan {command} ")
    assert error.endswith("unrecognized arguments: --zzz\n")


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Path) -> Path:
    """A run folder that was moved after training, seen from where it is."""
    folder = tmp_path / "moved run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "run_dir": "runs/old", "data": {"path": str(digits), "resolution": 16},
        "training": {"steps": 1, "batch_size": 8},
    }))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_config_of_a_moved_run_is_noticed(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fix = "distgan train 'moved run/config.yaml' 'run_dir=moved run'\n"
    for arguments in (["trace", "moved run/config.yaml", "--steps", "0:1"], ["status", "moved run/config.yaml"]):
        cli.main(arguments)
        error = capsys.readouterr().err
        assert error.startswith("distgan: warning: moved run/config.yaml: ")
        assert "run_dir = runs/old" in error
        assert error.endswith(fix)
        assert error.count("\n") == 1
    assert fix in stderr_of_mistake(capsys, "stop", "moved run/config.yaml")


def test_the_config_of_a_run_where_it_says_it_is_needs_no_warning(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "moved run/config.yaml"
    cli.main(["trace", config, "run_dir=moved run", "--steps", "0:1"])
    cli.main(["trace", config, "run_dir=another", "--steps", "0:1"])
    (moved.parent / "recipe").mkdir()
    (moved / "config.yaml").rename(moved.parent / "recipe" / "config.yaml")
    cli.main(["trace", "recipe/config.yaml", "--steps", "0:1"])
    (moved.parent / "runs").mkdir()
    (moved.parent / "runs" / "old").symlink_to(moved)
    (moved.parent / "recipe" / "config.yaml").rename(moved / "config.yaml")
    cli.main(["trace", config, "--steps", "0:1"])
    assert capsys.readouterr().err == ""


def test_one_rank_warns_of_a_moved_run(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in zip(LAUNCHER, ("2", "1", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    cli.main(["trace", "moved run/config.yaml", "--steps", "0:1"])
    assert capsys.readouterr().err == ""


def stderr_of_mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "probe", "sample", "export"])
def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    more = {"sample": ["--out", "x.png"], "export": [str(tmp_path / "x")]}.get(command, [])
    assert "does not exist; pass a run folder or" in mistake(capsys, command, str(tmp_path / "none"), *more)
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    assert "pass the run_dir" in mistake(capsys, command, str(recipe), *more)
