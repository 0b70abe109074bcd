"""docs/cluster.md keeps to what there is: files, commands, keys and messages."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from distgan.cli.parser import parse
from distgan.config import Config, flatten, parse_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "cluster.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", TEXT)
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines()]
SOURCES = "\n".join(path.read_text() for path in (ROOT / "distgan").rglob("*.py"))


def literals() -> list[str]:
    """The strings of the program that are not docstrings, with a gap for each placeholder."""
    tree = ast.parse(SOURCES.replace("from __future__ import annotations", ""))
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("\0".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            found.append(node.value)
    return found


def test_files_are_there() -> None:
    named = set(re.findall(r"(?:launch|configs|docs)/[\w./-]+\w", TEXT)) - {"configs/x.yaml"}
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_distgan_accepts_the_commands() -> None:
    accepted = 0
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if "distgan" in words:
            parse(words[words.index("distgan") + 1 :])
            accepted += 1
    assert accepted >= 8


def test_keys_exist() -> None:
    whole = parse_config(
        {"run_dir": "r", "data": {"path": "d", "resolution": 8}, "training": {"steps": 1, "batch_size": 2}}
    )
    sections = "|".join(name for name, value in Config.model_fields.items() if name not in ("run_dir", "seed"))
    keys = {key for code in CODE for key in re.findall(rf"(?:^|\s)((?:{sections})\.\w+)", code)}
    assert len(keys) > 10
    assert keys - set(flatten(whole)) == set()


@pytest.mark.parametrize(
    "message",
    re.findall(r"^\| `([^`]+)` \|", TEXT.partition("## What each error")[2].partition("\n## ")[0], re.MULTILINE),
)
def test_messages_are_the_programs(message: str) -> None:
    """Every fixed part of it, between numbers and names."""
    parts = [part for part in re.split(r"\bN\b|\d+|\.\.\.|rank|generator", message) if len(part.strip(" ,;'")) > 3]
    assert parts
    texts = literals()
    for part in parts:
        assert any(part.strip() in text for text in texts), part


def test_faults_have_the_tests_that_are_named() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {code for code in CODE if code.startswith("test_")}
    assert len(named) > 25
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_scalars_are_the_ones_that_are_written() -> None:
    table = TEXT.partition("## Reading the TensorBoard page")[2].partition("## ")[0]
    names = re.findall(r"`((?:speed|ranks|skipped_updates|data|checkpoint|memory|discriminator)/\w+)`", table)
    assert len(names) >= 9
    for name in names:
        tag = name.replace("/generator", "/{player.role}") if name.startswith("skipped") else name
        assert f'"{tag}"' in SOURCES, name


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", TEXT, re.M)
    }
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) <= headings
