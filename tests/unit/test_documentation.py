"""Every page names only what there is: files, links, commands, keys, messages, scalars and functions."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distgan.cli.parser import build_parser, parse
from distgan.config import Config
from tests.unit.test_imports import LAYERS
from tools.config_page import keys_of, sections_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

EXAMPLES = {"configs/x.yaml", "configs/photos.yaml", "docs/benchmarks-gpu.md"}
"""Files that a reader or a tool makes."""
SCRIPTS = {"node.sh": [], "pod.sh": [], "train.sbatch": ["train"], "evaluate.sbatch": ["evaluate"]}
"""Scripts of launch/ that pass their arguments on to distgan, with what they put before them."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """Code inside the sentences of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def shell_lines(page: Path) -> list[str]:
    """Commands in the blocks of a page."""
    blocks = [block for kind, block in _FENCE.findall(page.read_text()) if kind == "sh"]
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def words_of(command: str) -> list[str]:
    """The words of a shell command, those of a command in quotes too."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:  # code that is not a command
        words = command.split()
    return [part for word in words for part in (words_of(word) if "distgan " in word and word != command else [word])]


def distgan_arguments(command: str) -> Iterator[list[str]]:
    """What each call of distgan in a shell command is given."""
    words = words_of(command)
    for place, word in enumerate(words):
        name = word.rpartition("/")[2]
        if word == "distgan" or (name in SCRIPTS and "launch/" in word):
            given = [*SCRIPTS.get(name, [])]
            for argument in words[place + 1 :]:
                if re.match(r"2?[|<>&;]", argument):
                    break
                given.append(argument)
            yield given


@functools.cache
def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of distgan."""
    actions = build_parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


@functools.cache
def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.*)", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@functools.cache
def literals() -> list[str]:
    """The strings of the program that are not docstrings, with a gap for each placeholder."""
    found = []
    for file in (ROOT / "distgan").rglob("*.py"):
        found += strings_of(file)
    return found


def strings_of(file: Path) -> list[str]:
    """The strings of a file that are not docstrings, with a gap for each placeholder."""
    tree = ast.parse(file.read_text())
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            found.append(node.value)
    return found


@functools.cache
def definitions(file: Path) -> set[str]:
    """Functions, classes, methods and assigned names of a file."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{member.name}" for member in members if isinstance(member, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of the tables of a text, without their heads."""
    found = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in found if not set("".join(row)) <= set("-: |")]


def section(page: Path, heading: str) -> str:
    """The text below a heading of the second level."""
    return page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@every_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


@every_page
def test_merges_are_finished(page: Path) -> None:
    assert re.findall(r"^(?:<{7}|={7}$|>{7}).*", page.read_text(), re.MULTILINE) == []


@every_page
def test_files_exist(page: Path) -> None:
    pattern = r"(?<![\w./-])(?:launch|configs|docs|tools|tests|distgan)/(?:[\w./-]*\w)?"
    named = {name for text in [*spans(page), *shell_lines(page)] for name in re.findall(pattern, text)}
    assert [name for name in named - EXAMPLES if not (ROOT / name).exists()] == []


@every_page
def test_distgan_accepts_the_commands(page: Path) -> None:
    for line in shell_lines(page):
        for arguments in distgan_arguments(line):
            parse(arguments)
    for span in spans(page):
        for command, *arguments in filter(None, distgan_arguments(span)):
            if command.startswith("-") or not command.islower():
                continue
            assert command in commands(), span
            options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            assert options <= set(commands()[command]._option_string_actions), span


def test_commands_are_found() -> None:
    """The test above looks at commands of every kind: in a block, in quotes, behind a script, in a sentence."""
    found = [arguments for page in PAGES for line in shell_lines(page) for arguments in distgan_arguments(line)]
    assert len(found) >= 15
    assert [*distgan_arguments("ssh a 'cd b && torchrun -m distgan train c.yaml > d'")] == [["train", "c.yaml"]]
    assert [*distgan_arguments("sbatch --nodes=2 launch/slurm/train.sbatch c.yaml")] == [["train", "c.yaml"]]
    assert [*distgan_arguments("srun launch/slurm/node.sh doctor c.yaml")] == [["doctor", "c.yaml"]]


@every_page
def test_tools_and_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in [*spans(page), *shell_lines(page)]:
        for target in re.findall(r"^make ([\w-]+)", text):
            assert target in targets, text
        for tool, rest in re.findall(r"(?<![\w/])(tools/[\w/]+\.py)([^|;&]*)", text):
            source = (ROOT / tool).read_text()
            for option in re.findall(r"(?<!\S)--([\w-]+)", rest):
                assert re.search(rf'"(--)?{option}"', source), text


@every_page
def test_keys_exist(page: Path) -> None:
    keys = {f"{path}.{name}" for path, model in sections_of(Config) for name in keys_of(model)}
    tops = "|".join({key.partition(".")[0] for key in keys})
    pattern = rf"(?<![\w./-])((?:{tops})(?:\.\w+)+)(?![\w(/.])"
    named = {key for text in [*spans(page), *shell_lines(page)] for key in re.findall(pattern, text)}
    files = {key for key in named if key.rpartition(".")[2] in ("py", "yaml", "json", "safetensors", "png")}
    sides = {key for key in named if re.fullmatch(r"growth\.batch_sizes\.\d+", key)}
    shown = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    sections = [entry for text in shown for entry in yaml.safe_load(text).items() if isinstance(entry[1], dict)]
    own = {f"{name}.{key}" for name, section in sections for key in section}
    assert named - files - sides - own <= keys


MESSAGES = [
    message
    for row in rows(section(DOCS / "troubleshooting.md", "Messages"))
    for message in re.findall(r"`([^`]+)`", row[0])
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_the_programs(message: str) -> None:
    """Its fixed parts, between `...` and `N`, are in one message of the program, in this order."""
    parts = [part.strip() for part in re.split(r"\bN\b|\.\.\.", message) if part.strip(" ,;:'")]
    assert parts
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in literals())


def test_messages_are_found() -> None:
    assert len(MESSAGES) >= 30


def test_tests_that_are_named_exist() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {span for page in PAGES for span in spans(page) if re.fullmatch(r"test_\w+", span)}
    assert len(named) > 25
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_measured_faults_are_those_that_the_cluster_tests_print() -> None:
    printed = "\n".join(path.read_text() for path in (ROOT / "tests" / "cluster").glob("*.py"))
    table = section(DOCS / "resume.md", "Faults, measured").partition("\nThese faults")[0]
    measured = [row[0] for row in rows(table)][1:]
    assert len(measured) > 8
    for fault in measured:
        name = re.sub(r"=(USR1|TERM)", "={name}", fault)
        assert name in printed, fault


def test_scalars_are_the_ones_that_are_written() -> None:
    table = section(DOCS / "monitoring.md", "Scalars")
    documented = {tag for row in rows(table) for tag in re.findall(r"`([a-z_]+/\w+)`", row[0])}
    package = ROOT / "distgan"
    files = [*(package / "players").glob("*.py"), package / "training/monitor.py", package / "monitoring/stragglers.py"]
    written = {text for file in files for text in strings_of(file) if re.fullmatch(r"[a-z_]+/[\w\0]+", text)}
    roles = {tag.replace("\0", role) for tag in written for role in ("generator", "discriminator")}
    assert len(roles) > 30
    assert documented == roles


def units(page: Path) -> Iterator[tuple[str, bool]]:
    """The rows and the sections of a page, and whether it is a row."""
    for part in re.split(r"^(?=#+ )", prose(page), flags=re.MULTILINE):
        lines = part.splitlines()
        yield from ((line, True) for line in lines if line.startswith("|"))
        yield "\n".join(line for line in lines if not line.startswith("|")), False


@pytest.mark.parametrize("page", [DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_functions_are_defined_in_the_files_beside_them(page: Path) -> None:
    everything = {name for file in (ROOT / "distgan").rglob("*.py") for name in definitions(file)}
    looked_at = 0
    for text, is_row in units(page):
        linked = re.findall(r"\]\(((?:\.\./)?distgan/[^)#]+\.py)\)", text)
        there = {name for link in linked for name in definitions((page.parent / link).resolve())} or everything
        for span in re.findall(r"`([^`]+)`", text):
            call = re.fullmatch(r"(\w+(?:\.\w+)?)\(\)", span)
            constant = re.fullmatch(r"[A-Z][A-Z_]{3,}", span)
            kind = re.fullmatch(r"[A-Z][a-z]\w+", span)
            if call or constant:
                assert (call[1] if call else span) in there, span
            elif kind:
                assert span in (there if is_row else everything), span
            looked_at += bool(call or constant or kind)
    assert looked_at > 8


def test_the_layers_are_those_of_the_imports() -> None:
    (diagram,) = (block for kind, block in _FENCE.findall((DOCS / "architecture.md").read_text()) if kind == "text")
    drawn = [
        {word for line in row.strip().splitlines() for word in line[:38].split()}
        for row in re.split(r"^-+\n", diagram, flags=re.MULTILINE)
    ]
    assert drawn == list(LAYERS)
