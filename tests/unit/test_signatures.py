"""Signatures of a user's techniques: which are read as schemas, and what is said of the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distgan import extensions
from distgan.config import load_config
from distgan.errors import UserError

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


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("1 / 0", "importing it failed: ZeroDivisionError: division by zero"),
        ("import not_there", "importing it failed: ModuleNotFoundError: No module named 'not_there'"),
        ("class Net:\n  def __init__(self, shape): pass", "takes 1 positional parameters, expected at least 2"),
        ("class Net:\n  def __init__(self, shape, latent_size, optimizer=1): pass", "its parameter 'optimizer'"),
        ("class Net:\n  def __init__(self, shape, latent_size, x: 'Missing' = 1): pass", "signature cannot be read"),
        ("class Net:\n  def __init__(self, shape, latent_size, depth: int): pass", "generator.depth"),
        ("Net = 3", "found int, expected a class or a function"),
    ],
)
def test_code_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, part: str) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    strange(tmp_path, code)
    with pytest.raises(UserError, match="generator") as caught:
        load_config(recipe(tmp_path, generator={"architecture": "strange:Net"}))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_option_goes_to_a_signature_that_takes_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    strange(tmp_path, "class Net:\n  def __init__(self, shape, latent_size, **options): self.options = options")
    options = {"a": 1, "b": [2.5, {"c": True}], "d": "text", "e": None}
    config = load_config(recipe(tmp_path, generator={"architecture": "strange:Net", **options}))
    assert config.generator.build(None, 3).options == options


@pytest.mark.parametrize(
    ("signature", "options"),
    [
        ("self, shape, latent_size, *, hidden=8", {"hidden": 8}),
        ("self, *given, hidden=8", {"hidden": 8}),
        ("self, shape: 'Unknown', latent_size, hidden: int = 8", {"hidden": 8}),
    ],
)
def test_signatures_of_all_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signature: str, options: dict[str, Any]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    strange(tmp_path, f"class Net:\n  def __init__({signature}): self.hidden = hidden")
    config = load_config(recipe(tmp_path, generator={"architecture": "strange:Net"}), ["generator.hidden=9"])
    assert config.generator.options.model_dump() == {**options, "hidden": 9}
    assert config.generator.build(None, 3).hidden == 9


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("class Net:\n  kinds = 'images'\n  def __init__(self, shape, latent_size): pass", "kinds = 'images'"),
        ("class Net:\n  compares_batch = 'yes'\n  def __init__(self, shape, latent_size): pass", "compares_batch"),
        ("class Net:\n  def __init__(self, shape, latent_size, kinds=1): pass", "'kinds' has a name that is taken"),
        ("class Net:\n  def __init__(self, shape, latent_size, json=1): pass", "'json' has a name that is taken"),
        (
            "class Net:\n  def __init__(self, shape, latent_size, clip=float('inf')): pass",
            "'clip' has the default 'inf'",
        ),
        ("class Net:\n  def __init__(self, shape, latent_size, act=dict): pass", "'act' has the default"),
        ("def Net(a, b, c, /): pass", "'c' is positional only"),
        ("import sys\nsys.exit(3)", "SystemExit"),
    ],
)
def test_facts_and_names_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, part: str) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    strange(tmp_path, code)
    with pytest.raises(UserError, match=r"generator\.architecture: strange:Net") as caught:
        load_config(recipe(tmp_path, generator={"architecture": "strange:Net"}))
    assert part in str(caught.value)


@pytest.mark.parametrize("text", ["nan", "1_0", "inf"])
def test_numbers_of_options_are_read_as_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    strange(tmp_path, "class Net:\n  def __init__(self, shape, latent_size, rate: float = 1, depth: int = 2): pass")
    for key in ("rate", "depth"):
        with pytest.raises(UserError, match=f"generator.{key}"):
            load_config(recipe(tmp_path, generator={"architecture": "strange:Net"}), [f"generator.{key}={text}"])


def test_facts_of_a_users_network_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator that says it has batch norm is refused with a gradient penalty, as a built-in one is."""
    monkeypatch.syspath_prepend(str(tmp_path))
    strange(tmp_path, "class Net:\n  normalizes_batch = True\n  def __init__(self, shape): pass")
    sections = {"discriminator": {"architecture": "strange:Net"}, "objective": {"gradient_penalty": {}}}
    with pytest.raises(UserError, match="batch norm"):
        load_config(recipe(tmp_path, **sections))
