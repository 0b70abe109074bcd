"""Digests of code without a file: equal in every process, changed by what the code uses, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from distgan.extensions import package_digest, refresh_digests
from tests.notebooks import cells

IMPORTS = "import math\nfrom math import pi\nfrom distgan.extensions import code_digest_of, code_digests"
CODE = """
SLOPE = 0.2
KINDS = frozenset({"images", "text", "points", "tables"})

def scale(x, *, power=2):
    return x ** power * SLOPE

def traced(function):
    def wrapper(*given):
        return function(*given)
    return wrapper

class Base:
    bias = 1

class Net(Base):
    widths = (8, 16)

    def __init__(self, hidden: int = 8):
        self.hidden = hidden
        self.lines = [scale(n) for n in range(3)]

    @traced
    def forward(self, x):
        return scale(x) + math.sin(x) if x in {"a", "b", "c"} or x in KINDS else [self.other(y) for y in x]

    def other(self, y):
        return y
"""
PRINT = "print(code_digest_of('__main__:Net'))"


def digests(*changes: str) -> list[str]:
    """The digest at first, and after each change."""
    return cells(IMPORTS, CODE, PRINT, *(line for change in changes for line in (change, PRINT)))


@pytest.mark.parametrize("change", [
    "SLOPE = 0.3",
    "KINDS = frozenset()",
    "def scale(x, *, power=2):\n    return x ** power * SLOPE + 1",
    "def scale(x, *, power=3):\n    return x ** power * SLOPE",
    CODE.replace("bias = 1", "bias = 2"),
    CODE.replace("(8, 16)", "(8, 32)"),
    CODE.replace("return y\n", "return -y\n"),
    CODE.replace("return function(*given)", "return -function(*given)"),
])  # fmt: skip
def test_what_the_code_uses_changes_it(change: str) -> None:
    before, after = digests(change)
    assert before != after


def test_nothing_else_does() -> None:
    """The same code run again, whole or in parts; other definitions; another process, with other hashes of text."""
    [first] = digests()
    again = CODE.partition("def traced")[0].partition("\n\n")[2]
    same = digests(CODE, again, "lines, x, hidden = 1, 2, 3\ndef plot(): pass\nclass Other(Net): pass", "made = Net()")
    assert {*same} == {first}


def test_without_kept_sources_too() -> None:
    """As in code that another program runs: by bytecode."""
    forget = "import linecache; linecache.cache.clear()"
    found = [cells(IMPORTS, CODE, forget, PRINT, "SLOPE = 0.3", PRINT) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_package_of_several_definitions_has_one_digest() -> None:
    both = "print(code_digests(['__main__:Net', '__main__:Base', '__main__:Net']).keys())"
    assert cells(IMPORTS, CODE, both) == ["dict_keys(['__main__'])"]
    one = "print(code_digests(['__main__:Net']) == {'__main__': code_digest_of('__main__:Net')})"
    assert cells(IMPORTS, CODE, one) == ["True"]


def test_files_of_editors_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "edited"
    (package / ".ipynb_checkpoints").mkdir(parents=True)
    (package / "__init__.py").write_text("one = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = package_digest("edited")
    (package / ".#nets.py").symlink_to("someone@host.1234")
    (package / ".ipynb_checkpoints" / "nets.py").write_text("two = 2")
    refresh_digests()
    assert package_digest("edited") == before
    (package / "nets.py").write_text("two = 2")
    assert package_digest("edited") == before, "what runs is the code of the beginning"
    refresh_digests()
    assert package_digest("edited") != before
