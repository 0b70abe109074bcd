from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import dump_config, json_schema, load_config, parse_config
from distgan.errors import UserError

MINIMAL: dict[str, Any] = {
    "run_dir": "r",
    "data": {"path": "d", "resolution": 32},
    "training": {"steps": 5, "batch_size": 8},
}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.stepz=3", ["unknown key 'training.stepz'", "did you mean 'training.steps'"]),
        ("objective.r1={gama: 1}", ["unknown key 'objective.r1.gama'", "'objective.r1.gamma'"]),
        ("batch_size=3", ["unknown key 'batch_size'", "batch_size'?"]),
        ("xyzzy=3", ["unknown key 'xyzzy'", "accepted here: run_dir, seed, data"]),
        ("training.steps=0", ["training.steps = 0", "greater than or equal to 1"]),
        ("training.steps=yes", ["training.steps", "found a boolean"]),
        ("training.steps=many", ["training.steps = 'many'", "integer"]),
        ("training.mixed_precision=fp16", ["training.mixed_precision", "fp16 is refused", "bf16"]),
        ("training.mixed_precision=fp8", ["training.mixed_precision = 'fp8'", "'no' or 'bf16'"]),
        ("training.accumulation=3", ["training.batch_size", "does not divide", "training.accumulation=3"]),
        ("data.resolution=33", ["data.resolution", "33 is not a power of two"]),
        ("data.max_failure_rate=.nan", ["data.max_failure_rate = nan", "finite"]),
        ("seed=-1", ["seed = -1"]),
        ("generator.optimizer.betas=[0.5, 1.5]", ["generator.optimizer.betas", "1.5 is not in [0, 1)"]),
        ("objective.adversarial=wgann", ["objective.adversarial = 'wgann'", "'non_saturating'"]),
        ("data=3", ["data = 3"]),
        ("seed.x=3", ["'seed' is not a section"]),
        ("training.steps", ["expected section.key=value"]),
        ("training.steps=[", ["not a YAML value"]),
    ],
)
def test_mistakes_are_one_line_naming_key_and_fix(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = write(tmp_path, yaml.safe_dump({**MINIMAL, "seed": 1}))
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("training: {steps: 1, steps: 2}", "the key 'steps' is given twice"),
        ("a: [", "not valid YAML"),
        ("- 1", "mapping of sections, found list"),
        ("", "mapping of sections, found NoneType"),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
        ("run_dir: r", "missing"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        load_config(write(tmp_path, text))
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the config: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


@given(
    steps=st.integers(1, 10**9),
    rate=st.floats(1e-9, 1.0),
    mirror=st.booleans(),
    penalty=st.none() | st.fixed_dictionaries({"gamma": st.floats(1e-3, 1e3), "every": st.integers(1, 64)}),
    paths=st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=3),
)
def test_the_resolved_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, steps: int, rate: float, mirror: bool, penalty: Any, paths: Any
) -> None:
    config = parse_config(
        {
            "run_dir": "r",
            "data": {"path": paths, "resolution": 64, "mirror": mirror},
            "generator": {"optimizer": {"learning_rate": rate}},
            "objective": {"r1": penalty},
            "training": {"steps": steps, "batch_size": 8},
        }
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 2e-4 as text.
    config = load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), ["generator.optimizer.learning_rate=2e-4"])
    assert config.generator.optimizer.learning_rate == 2e-4


def test_every_key_is_documented_in_the_schema() -> None:
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        for name, field in section["properties"].items():
            described = field if "description" in field or "$ref" not in field else schema["$defs"][field["$ref"][8:]]
            assert described.get("description"), name


def test_recipes_are_valid_and_named_after_their_file() -> None:
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        assert load_config(path).run_dir == f"runs/{path.stem}"
