"""docs/config.md is what the schema says, and how its table is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from distgan.config import Config, flatten, parse_config
from tools.config_page import PAGE, anchor, number, with_bounds
from tools.config_page import describe as described

ROOT = Path(__file__).parents[2]


def test_the_page_is_of_this_schema() -> None:
    checked = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "config_page.py"), "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_every_key_is_on_the_page() -> None:
    minimal = {"run_dir": "r", "data": {"path": "d", "resolution": 8}, "training": {"steps": 1, "batch_size": 2}}
    keys = {key.rpartition(".")[2] for key in flatten(parse_config(minimal))}
    page = PAGE.read_text()
    assert [key for key in sorted(keys) if f"| `{key}` |" not in page] == []


def test_sentences_of_docstrings_are_not_indented() -> None:
    assert [line for line in PAGE.read_text().splitlines() if line.startswith(" ")] == []


def test_every_key_is_described() -> None:
    def check(section: type, path: str) -> list[str]:
        fields = section.model_fields.items()  # type: ignore[attr-defined]
        return [f"{path}{name}" for name, field in fields if not field.description]

    assert check(Config, "") == []


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "integer"),
        (float | None, "number or `null`"),
        (Literal["a", "b"], "`a` or `b`"),
        (list[str], "list of text"),
        (dict[int, bool], "mapping of integer to `true` or `false`"),
        (Annotated[int, Field(ge=1, le=65536), Field(le=8)], "integer ≥ 1 ≤ 8"),
        (Annotated[float, Field(gt=0, lt=1)], "number > 0 < 1"),
    ],
)
def test_types_in_the_words_of_yaml(annotation: object, text: str) -> None:
    assert described(annotation) == text


def test_bounds_that_are_powers_of_two() -> None:
    assert (number(1 << 40), number((1 << 63) - 1), number(1000), number(0.5)) == ("2^40", "2^63 - 1", "1000", "0.5")
    assert with_bounds("integer", [Field(ge=0), Field(ge=4)]) == "integer ≥ 4"


def test_anchors_are_githubs() -> None:
    assert anchor("`generator.optimizer`, `discriminator.optimizer`") == "generatoroptimizer-discriminatoroptimizer"
