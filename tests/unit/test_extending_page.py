"""docs/extending.md: its code is that of tests/plugins, its recipe loads, and its programs run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distgan import extensions
from distgan.config import load_config
from distgan.config.architectures import NetworkOptions
from distgan.config.data import StagesOptions
from distgan.config.evaluation import MetricOptions
from distgan.config.objective import LossOptions
from distgan.config.objective.augmentation import AugmentationOptions
from distgan.config.objective.terms import TermOptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
LAB = ROOT / "tests" / "plugins" / "lab"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(LAB.parent))
    monkeypatch.setattr(extensions, "_packages", set())
    monkeypatch.setattr(extensions, "_paths", set())
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        del sys.modules[name]


def test_its_code_is_that_of_the_package() -> None:
    sources = "\n".join(path.read_text() for path in LAB.glob("*.py"))
    shown = [block for block in blocks("python") if block.startswith(("class ", "def "))]
    assert len(shown) >= 5
    assert [block for block in shown if block not in sources] == []


def test_its_recipe_loads_and_every_option_arrives(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    minimal = {
        "run_dir": "r",
        "training": {"steps": 1, "batch_size": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**minimal, **yaml.safe_load(text)}))
    data = ["data.path=d", "data.resolution=16", "data.channels=1"]
    config = load_config(path, ["generator.hidden=256", *data])
    assert config.data.stages is not None
    assert config.data.stages.options.gamma == 1.2
    assert (config.generator.options.hidden, config.generator.options.heads) == (256, 4)
    assert config.generator.optimizer.options.weight_decay == 0.01
    assert config.objective.adversarial.build().margin == 0.5
    assert [metric.label for metric in config.metrics] == ["fid", "Sharpness", "Contrast", "Recall"]


def test_its_program_runs() -> None:
    [program] = [block for block in blocks("python") if "distgan.Config(" in block]
    found: dict[str, object] = {}
    exec(program, found)
    assert found["config"].generator.architecture == "lab.nets:Generator"  # type: ignore[attr-defined]


def test_its_facts_are_those_that_are_read() -> None:
    [table] = re.findall(r"^\| attribute .*?(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    bases = (NetworkOptions, LossOptions, TermOptions, AugmentationOptions, MetricOptions, StagesOptions)
    read = {fact for base in bases for fact in base.__class_vars__}
    properties = {"normalizes_batch", "bounds_slope", "latent_distribution"}
    assert all(isinstance(vars(NetworkOptions)[name], property) for name in properties)
    assert named == (read | properties) - {"takes_effect_with"}
