"""The layers of the package: imports point down, and no two modules import each other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import distgan

ROOT = Path(distgan.__file__).parent

LAYERS = (
    {"__main__"},
    {"cli"},
    {"doctor"},
    {"training"},
    {"inference"},
    {"runs"},
    {"checkpoint"},
    {"autoencoders", "metrics"},
    {"evaluation", "monitoring", "players"},
    {"data", "losses", "networks"},
    {"distributed", "schedule"},
    {"config"},
    {"published_weights"},
    {"hub_errors"},
    {"extensions", "files", "interpolation", "packages", "randomness", "version"},
    {"code_description", "errors"},
)
"""From the top down. A module may import from layers below its own, and from its own package."""

FACADE = "distgan"
"""The public API: it imports what it offers when it is asked for, from any layer."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere in it, those for types only included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def layer(module: str) -> int:
    package = module.split(".")[1]
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


def test_every_module_has_a_layer() -> None:
    packages = {module.split(".")[1] for module in MODULES if module != FACADE}
    assert packages == set().union(*LAYERS)


def test_imports_point_down() -> None:
    upward = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if module != FACADE
        for other in imported(path)
        if other == FACADE or (other.split(".")[1] != module.split(".")[1] and layer(other) <= layer(module))
    ]
    assert not upward


def test_no_circle() -> None:
    graph = {module: imported(path) - {module} for module, path in MODULES.items() if module != FACADE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"these import each other: {' -> '.join(error.args[1])}") from None


def test_folders_are_small_enough_to_take_in() -> None:
    folders = {path.parent for path in MODULES.values()}
    sizes = {folder: sum(path.name != "__init__.py" for path in folder.glob("*.py")) for folder in folders}
    assert {folder.name: size for folder, size in sizes.items() if size > 12} == {}
