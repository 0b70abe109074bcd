"""Recipes as files and in Python: YAML that is read, and one line for what is none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from distgan.config import Config, load_config
from distgan.errors import UserError
from tests.configs import VALID, write


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("training: {steps: 1, steps: 2}", "the key 'steps' is given twice"),
        ("a: [", "not valid YAML"),
        ("- 1", "mapping of sections, found a list"),
        ("", "mapping of sections, found nothing"),
        ("run_dir: null", "run_dir = None: "),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
        ("!!python/name:os.system : 3", "line 1: the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: 1\n!x b: 3", "line 2: the tag '!x'"),
        ("run_dir: r", "missing"),
        ("run_dir: !!timestamp nonsense", "not valid YAML"),
        ("run_dir: !!int ''", "not valid YAML"),
        ("2024-01-02: 3", "unknown key '2024-01-02'"),
        ("2024-13-45: 3", "unknown key '2024-13-45'"),
        ("[a, b]: 3", "a key is not a word"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        (VALID + "\nseed: " + "1" * 5000, "seed: expected a decimal number"),
        ("foo: &a [*a]", "an alias that contains itself"),
        ("foo: &a {b: *a}", "an alias that contains itself"),
        ("foo: &a {a: 1}\nbar: {<<: *a}", "line 2: merge keys (<<)"),
        ("x: {a: 1, a: 2}", "line 1: the key 'a' is given twice"),
        ("a: 1\n---\na: 2", "not valid YAML"),
        ("# " + "x" * (1 << 20), "larger than the 1048576 bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_files(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UserError, match=re.escape(part)) as caught:
        load_config(write(tmp_path, text))
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_aliases_that_unfold_into_billions_of_values(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2, 3]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(UserError, match="more than 100000 values"):
        load_config(write(tmp_path, "\n".join(lines)))


def test_an_alias_repeats_a_section(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"{VALID}\ngenerator: &player {{width: 32}}\ndiscriminator: *player"))
    assert (config.generator.width, config.discriminator.width) == (32, 32)


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training\.steps=5: .*recipe.*key=value"):
        load_config("training.steps=5")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: found a folder, .*path of a YAML recipe"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}: .* {re.escape(str(tmp_path))}/config\.yaml$"):
        load_config(tmp_path)
    with pytest.raises(UserError, match=r"none\.yaml: .*No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"run_dir": "r"}, ["Config: 'data' is missing"]),
        ({"trainin": {"steps": 2}}, ["Config: unknown key 'trainin'", "did you mean 'training'?"]),
        ({"run_dir": "r", "data": {"path": "d", "resolution": 1.5}}, ["Config: data.resolution = 1.5"]),
    ],
)
def test_a_mistake_in_python_is_one_line(sections: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Config(**sections)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)
