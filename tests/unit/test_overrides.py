"""Overrides: a value is read as it is typed, and as in a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import load_config, parse_config
from distgan.errors import UserError
from tests.configs import MINIMAL, VALID, write

ODD_TEXTS = [
    "runs/hash #2", "#2", "a: b", "a:", "'quoted'", '"quoted"', "'half", " spaces ", "\ttab", "no", "Yes", "on", "off",
    "~", "true", "010", "0x10", "1:30", "1_000", "1e-4", ".inf", "!tag", "&anchor", "*alias", "{", "}", "[", "]",
    "{a: 1}", "[a] b", "a, b", "- a", "? a", "%YAML", "@", "`", "|", ">", "<<", "---", "a=b", "=", "2024-01-02", "\\n",
    "é\u2028ü",
]  # fmt: skip


@given(st.sampled_from(ODD_TEXTS) | st.text(max_size=30))
def test_an_override_of_a_text_key_arrives_as_typed(text: str) -> None:
    changes = [f"{key}={text}" for key in ("data.path", "data.cache_dir", "evaluation.held_out")]
    config = parse_config(MINIMAL, changes if text != "null" else changes[1:])
    if text != "null" and not (text.strip().startswith("[") and text.strip().endswith("]")):
        assert config.data.path == text
    for found in (config.data.cache_dir, config.evaluation.held_out):
        assert found == (None if text == "null" else text)


@given(st.sampled_from(ODD_TEXTS) | st.text(max_size=30))
def test_a_text_key_of_a_file_takes_what_yaml_quotes(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("quoted") / "recipe.yaml"
    path.write_text(f"{VALID}\n{yaml.safe_dump({'evaluation': {'held_out': text}})}", encoding="utf-8")
    assert load_config(path).evaluation.held_out == text


YAML_1_1 = ["no", "yes", "on", "off", "true", "010", "0x10", "1:30", "1_000", "1e-4", "2024-01-02"]


@pytest.mark.parametrize("word", YAML_1_1)
def test_plain_words_of_yaml_1_1_are_text(tmp_path: Path, word: str) -> None:
    assert load_config(write(tmp_path, f"{VALID}\nevaluation: {{held_out: {word}}}")).evaluation.held_out == word


NO_DECIMALS = ["010", "0123", "-01", "0x10", "0o17", "0b1", "1:30", "1_000", "1,000", "+-1", "1e", ".", "٣", "yes"]


@pytest.mark.parametrize("text", [*NO_DECIMALS, "1 #2"])
def test_numbers_of_overrides_are_decimal_or_refused(text: str) -> None:
    for override in (f"training.steps={text}", f"generator.optimizer.betas=[{text}, 0.5]", f"data.channels={text}"):
        with pytest.raises(UserError, match=re.escape(override.partition("=")[0])) as caught:
            parse_config(MINIMAL, [override])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quote", ["", "'"])
@pytest.mark.parametrize("text", NO_DECIMALS)
def test_numbers_of_files_are_decimal_or_refused(tmp_path: Path, text: str, quote: str) -> None:
    with pytest.raises(UserError, match=f"seed: .*decimal.*{re.escape(repr(text))}") as caught:
        load_config(write(tmp_path, f"{VALID}\nseed: {quote}{text}{quote}"))
    assert "\n" not in str(caught.value)


@given(st.integers(0, 2**63 - 1), st.floats(0, 1e12), st.sampled_from(["", "+"]))
def test_decimal_numbers_of_all_forms(whole: int, real: float, sign: str) -> None:
    for text in (repr(real), f"{real:e}", f"{real:.20g}", f"{real:.3E}"):
        config = parse_config(MINIMAL, [f"seed={sign}{whole}", f"ema.half_life_kimg={sign}{text}"])
        assert (config.seed, config.ema.half_life_kimg) == (whole, float(text))


def test_no_is_a_precision(tmp_path: Path) -> None:
    path = write(tmp_path, VALID.replace("steps: 5", "steps: 5, mixed_precision: no"))
    assert load_config(path).training.mixed_precision == "no"
    assert load_config(path, ["training.mixed_precision=no"]).training.mixed_precision == "no"


@pytest.mark.parametrize(("word", "value"), [("true", True), ("no", False), ("on", True), ("False", False)])
def test_booleans(tmp_path: Path, word: str, value: bool) -> None:
    path = write(tmp_path, VALID.replace("steps: 5", f"steps: 5, channels_last: {word}"))
    assert load_config(path).training.channels_last is value
    assert parse_config(MINIMAL, [f"data.mirror={word}"]).data.mirror is value


def test_overrides_leave_the_values_alone() -> None:
    before = repr(MINIMAL)
    assert parse_config(MINIMAL, ["training.steps=7", "generator.optimizer.eps=1"]).training.steps == 7
    assert repr(MINIMAL) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [("training.steps=many", "training.steps"), ("generator.widht=3", "generator.widht"), ("run_dir=null", "run_dir"),
     ("objective.r1={gamma: -1}", "objective.r1.gamma"), ("data.path=null", "data.path")],
)  # fmt: skip
def test_a_wrong_override_is_named_instead_of_the_file(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"override '{override}': ")) as caught:
        load_config(write(tmp_path, VALID), ["seed=3", override])
    assert key in str(caught.value)
    assert "recipe.yaml" not in str(caught.value)


def test_the_last_override_of_a_key_counts() -> None:
    assert parse_config(MINIMAL, ["seed=1", "seed=2"]).seed == 2


def test_values_that_are_nested_deeply_are_refused() -> None:
    nested: Any = 1
    for _ in range(2000):
        nested = [nested]
    with pytest.raises(UserError, match="unknown key 'deep'"):
        parse_config({**MINIMAL, "deep": nested}, ["seed=1"])


def test_overrides_of_lists_and_mappings() -> None:
    config = parse_config(
        MINIMAL,
        ["data.path=[a, 's3://b/#1.tar']", "evaluation.metrics=[fid, kid]", "objective.r1={gamma: 1e-1}",
         "generator.optimizer.betas=[0, 0.9]", "objective.label_smoothing.real=[0.7, 0.9]", "data.channels=1",
         "growth=null",
         "training.early_stopping=null", "generator.reference_size=null"],
    )  # fmt: skip
    assert config.data.path == ["a", "s3://b/#1.tar"]
    assert config.model_dump()["evaluation"]["metrics"] == ["fid", "kid"]
    assert config.objective.r1 is not None
    assert config.objective.r1.gamma == 0.1
    assert config.generator.optimizer.betas == (0.0, 0.9)
    assert config.objective.label_smoothing is not None
    assert config.objective.label_smoothing.real == (0.7, 0.9)
    assert config.data.channels == 1


@pytest.mark.parametrize(
    "path",
    ["[ab]*.tar", "[ab]/*[0-4]", "[a", "*.tar", "{0..3}.tar", "{a,b}/*.tar", "s3://b/{000..127}.tar", "2024-13-45"],
)
def test_paths_in_overrides_need_no_quotes(tmp_path: Path, path: str) -> None:
    assert load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), [f"data.path={path}"]).data.path == path


def test_folders_that_look_like_dates_or_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-mine")
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    for text, folder in {"2024-13-45": "2024-13-45", "2024-01-02": "2024-01-02", "runs/x": "runs/x",
                         "runs/hash #2": "runs/hash #2", "~/x": "/home/of-mine/x"}.items():  # fmt: skip
        assert load_config(path, [f"run_dir={text}"]).run_dir == folder


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 2e-4 as text.
    config = load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), ["generator.optimizer.learning_rate=2e-4"])
    assert config.generator.optimizer.learning_rate == 2e-4


def test_options_of_a_technique_that_a_recipe_names_alone() -> None:
    objective = {"adversarial": "hinge", "augmentation": "ada"}
    values = {**MINIMAL, "objective": objective}
    config = parse_config(values, ["objective.augmentation.probability=0.5", "objective.augmentation.cutout=1"])
    assert config.objective.augmentation is not None
    assert config.objective.augmentation.technique == "ada"
    assert (config.objective.augmentation.probability, config.objective.augmentation.options.cutout) == (0.5, 1.0)
    assert parse_config(values, ["objective.adversarial.family=minimax"]).objective.adversarial.family == "minimax"
    assert objective == {"adversarial": "hinge", "augmentation": "ada"}, "the caller's values stay"
    with pytest.raises(UserError, match="no option of family: hinge"):
        parse_config(values, ["objective.adversarial.margin=2"])
