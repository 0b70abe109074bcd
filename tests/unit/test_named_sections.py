"""Techniques by import path: the signature is the schema, mistakes are one line, and nothing untrusted is imported."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distgan import extensions
from distgan.config import Config, GeneratorConfig, dump_config, json_schema, load_config, parse_config
from distgan.config.architectures import DISCRIMINATORS, GENERATORS
from distgan.config.evaluation import METRICS, DetectorConfig, MetricConfig
from distgan.config.named import BuiltIn
from distgan.config.objective import LOSSES
from distgan.config.objective.augmentation import AUGMENTATIONS
from distgan.config.objective.terms import TERMS
from distgan.config.players import OPTIMIZERS
from distgan.errors import UserError
from distgan.networks import build_generator
from distgan.networks.shape import SampleShape

PLUGINS = Path(__file__).parents[1] / "plugins"

MINIMAL: dict[str, Any] = {
    "run_dir": "r",
    "data": {"path": "d", "resolution": 16},
    "training": {"steps": 5, "batch_size": 8},
}


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages of tests/plugins can be imported, and none is allowed yet."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setattr(extensions, "_packages", set())
    monkeypatch.setattr(extensions, "_paths", set())
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lab", "strange")]:
        del sys.modules[name]


def recipe(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **sections}))
    return path


def strange(folder: Path, code: str) -> str:
    """Import path of a package with this code."""
    (folder / "strange.py").write_text(code)
    return "strange"


BUILT_IN = [
    *((f"generator {name}", built_in, 2) for name, built_in in GENERATORS.items()),
    *((f"discriminator {name}", built_in, 1) for name, built_in in DISCRIMINATORS.items()),
    *((f"loss {name}", built_in, 0) for name, built_in in LOSSES.items()),
    *((f"augmentation {name}", built_in, 0) for name, built_in in AUGMENTATIONS.items()),
    *((f"term {name}", built_in, 0) for name, built_in in TERMS.items()),
    *((f"optimizer {name}", built_in, 2) for name, built_in in OPTIMIZERS.items()),
    *((f"metric {name}", built_in, 0) for name, built_in in METRICS.items()),
    *((f"detector {name}", built_in, 0) for name, built_in in DetectorConfig.built_in.items()),
]


@pytest.mark.parametrize(("kind", "built_in", "given"), BUILT_IN, ids=[case[0] for case in BUILT_IN])
def test_options_of_built_in_techniques_are_their_signatures(kind: str, built_in: BuiltIn, given: int) -> None:
    parameters = list(inspect.signature(extensions.load(built_in.path, built_in=True)).parameters.values())[given:]
    offered = {"metric": MetricConfig.offered, "detector": DetectorConfig.offered}.get(kind.partition(" ")[0], ())
    fields = built_in.options.model_fields
    assert {parameter.name: parameter.default for parameter in parameters if parameter.name not in offered} == {
        name: field.default for name, field in fields.items()
    }


@pytest.mark.parametrize("name", METRICS)
def test_facts_of_built_in_metrics_are_those_of_their_classes(name: str) -> None:
    """So that one named by its import path, as others' are, is the same metric."""
    own, others = MetricConfig(metric=name), MetricConfig(metric=METRICS[name].path)
    for fact in ("kinds", "takes", "higher_is_better", "main_value"):
        assert getattr(own.facts, fact) == getattr(others.facts, fact), fact


def test_a_recipe_is_read_and_written_with_options_of_the_users_code(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        generator={"architecture": "lab.nets:Generator", "hidden": 16},
        discriminator={"architecture": "lab.nets:Discriminator"},
        objective={"adversarial": {"family": "lab.losses:Margin", "margin": 2}},
    )
    config = load_config(path, ["generator.heads=4", "discriminator.dropout=0.5"])
    assert (config.generator.options.hidden, config.generator.options.heads) == (16, 4)
    assert (config.discriminator.options.hidden, config.discriminator.options.dropout) == (32, 0.5)
    assert config.packages == ["lab"]
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert yaml.safe_load(dump_config(config))["generator"]["heads"] == 4, "defaults and overrides are written out"
    assert load_config(again) == config
    loss = config.objective.adversarial.build()
    # max(0, 2 - 1.5) + max(0, 2 - 3), by hand
    assert loss.discriminator(torch.tensor([1.5]), torch.tensor([-3.0])).item() == pytest.approx(0.5)


def test_a_class_stands_for_its_import_path() -> None:
    from lab.nets import Generator  # type: ignore[import-not-found]

    config = Config.model_validate({**MINIMAL, "generator": {"architecture": Generator, "hidden": 8}})
    assert config.generator.architecture == "lab.nets:Generator"
    network = build_generator(config.generator, SampleShape(resolution=16, channels=1))
    assert network(torch.zeros(2, 100), None).shape == (2, 1, 16, 16)

    class Local(Generator):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="top level of a module"):
        Config.model_validate({**MINIMAL, "generator": {"architecture": Local}})


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("generator.hidden=4", ["generator.hidden = 4", "greater than or equal to 8"]),
        ("generator.hidden=many", ["generator.hidden", "integer"]),
        ("generator.hiden=16", ["generator.hiden", "lab.nets:Generator", "did you mean 'hidden'?"]),
        ("generator.architecture=lab.nets:Genrator", ["generator.architecture", "lab.nets has no Genrator"]),
        ("generator.architecture=lab.nest:Generator", ["generator.architecture", "no module lab.nest", "PYTHONPATH"]),
        ("generator.architecture=nowhere:Generator", ["generator.architecture", "no module nowhere", "PYTHONPATH"]),
        ("generator.architecture=lab.nets", ["generator.architecture", "'lab.nets' is not known", "dcgan"]),
        ("generator.architecture=lab.nets:", ["generator.architecture", "'lab.nets:' is no import path"]),
        ("generator.architecture=../lab:Generator", ["generator.architecture", "'../lab:Generator' is no import path"]),
        ("generator.architecture=lab.nets:SampleShape.sizes", ["generator.architecture", "found property"]),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = recipe(tmp_path, generator={"architecture": "lab.nets:Generator"})
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_file_of_somebody_elses_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config of a checkpoint, of an export or of a run folder."""
    monkeypatch.syspath_prepend(str(tmp_path))
    mark = tmp_path / "imported"
    strange(tmp_path, f"open({str(mark)!r}, 'w')\nclass Net:\n  def __init__(self, shape, latent_size, depth=3): pass")
    values = {**MINIMAL, "generator": {"architecture": "strange:Net", "depth": 4}}
    config = parse_config(values)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    for found in (config, load_config(run / "config.yaml")):
        assert str(found.model_dump()["generator"]["depth"]) == "4", "options are kept"
        with pytest.raises(UserError, match="--allow strange"):
            build_generator(found.generator, SampleShape(resolution=16, channels=1))
    assert not mark.exists()
    extensions.allow("strange")
    assert load_config(run / "config.yaml").generator.options.depth == 4
    assert mark.exists()


def test_a_recipe_allows_only_the_paths_that_it_names(tmp_path: Path) -> None:
    load_config(recipe(tmp_path, generator={"architecture": "lab.nets:Generator"}))
    assert extensions.is_allowed("lab.nets:Generator")
    assert not extensions.is_allowed("lab.losses:Margin")
    assert not extensions.is_allowed("os:system")


@pytest.mark.parametrize(
    "path",
    [
        "distgan.files:os.system",
        "distgan.extensions:importlib.import_module",
        "os:system",
        "builtins:eval",
        "torch:load",
        "torch.optim:swa_utils.AveragedModel",
        "subprocess:run",
        "lab.nets:torch.hub.load",
        "lab.borrowed:system",
        "lab.borrowed:os.system",
    ],
)
def test_a_stranger_reaches_no_code_that_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Not through distgan's own modules, nor through what an allowed package imports."""
    shutil.copytree(PLUGINS / "lab", tmp_path / "site" / "lab")
    (tmp_path / "site" / "lab" / "borrowed.py").write_text("import os\nfrom os import system")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    extensions.allow("lab")
    ran = tmp_path / "ran"
    metric = {"metric": path, "command": f"touch {ran}"}
    config = parse_config({**MINIMAL, "evaluation": {"metrics": ["fid", metric]}})
    with pytest.raises(UserError):
        config.metrics[1].build()
    assert not ran.exists()


def test_an_override_and_a_program_are_the_users_own(tmp_path: Path) -> None:
    stored = parse_config(MINIMAL).model_dump(mode="json")
    config = parse_config(stored, ["evaluation.metrics=[lab.metrics:Sharpness]"])
    assert config.metrics[0].build().power == 1
    own = Config.model_validate({**MINIMAL, "objective": {"adversarial": "lab.losses:Margin"}})
    assert own.objective.adversarial.build().margin == 1


@pytest.mark.parametrize("metric", ["lab.gone:Metric", "gone:Metric", "__main__:Metric"])
def test_a_run_is_read_without_the_code_of_its_first_metric(metric: str) -> None:
    """That it does not say whether higher is better is no mistake of the run's."""
    extensions.allow(metric.partition(":")[0].partition(".")[0])
    config = parse_config({**MINIMAL, "evaluation": {"metrics": [{"metric": metric, "power": 2}]}})
    assert config.metrics[0].metric == metric
    with pytest.raises(UserError):
        config.metrics[0].load()


def test_trust_for_one_load_ends_with_it() -> None:
    with extensions.allowing("lab"):
        assert extensions.is_allowed("lab.nets:Generator")
    assert not extensions.is_allowed("lab.nets:Generator")


def test_the_json_schema_has_the_options_of_built_in_techniques() -> None:
    """Editors complete them, and show their text."""
    definitions = json_schema()["$defs"]
    for section, options in (
        ("GeneratorConfig", ["width", "normalization", "depth"]),
        ("DiscriminatorConfig", ["minibatch_stddev", "pooling"]),
        ("OptimizerConfig", ["betas", "alpha", "eps"]),
    ):
        for option in options:
            assert definitions[section]["properties"][option].get("description"), (section, option)
    assert "MinibatchStddevConfig" in definitions


def test_the_digest_of_a_package_is_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "strange"
    package.mkdir()
    digests = set()
    for name, code in (("__init__.py", ""), ("nets.py", "a = 1"), ("nets.py", "a = 2"), ("notes.txt", "not code")):
        (package / name).write_text(code)
        extensions.refresh_digests()
        digests.add(extensions.package_digest("strange"))
    assert len(digests) == 3


def test_reading_a_recipe_imports_no_torch() -> None:
    """Importing torch takes seconds, and a wrong key should be told at once."""
    code = (
        "import sys; from distgan.config import parse_config; import json; "
        "parse_config(json.loads(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    values = {**MINIMAL, "generator": {"architecture": "r3gan"}, "objective": {"adversarial": "relativistic_paired"}}
    subprocess.run([sys.executable, "-c", code, json.dumps(values)], check=True)


def test_equal_sections_are_equal_whatever_way_they_were_given() -> None:
    written_out = GeneratorConfig.model_validate({"width": 64, "normalization": "synchronized"})
    assert written_out == GeneratorConfig()
    assert written_out != GeneratorConfig.model_validate({"width": 32})
