"""Packages that distgan can do without, and what it does then."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from distgan.errors import UserError


class Optional(NamedTuple):
    """A package as `pip` names it, as Python imports it, and what is different without it."""

    name: str
    module: str
    without: str


OPTIONAL = (
    Optional("simplejpeg", "simplejpeg", "Pillow decodes JPEGs, several times slower"),
    Optional("tensorboard", "tensorboard", "curves are in metrics.jsonl alone"),
    Optional("rich", "rich", "plain lines take the place of the progress bar"),
    Optional("torch-fidelity", "torch_fidelity", "evaluation.detector: inception is not offered"),
    Optional("scikit-learn", "sklearn", "`pack builtin:digits` and `distgan probe` are not offered"),
)


def missing_packages() -> tuple[Optional, ...]:
    """Return those that are not installed here."""
    return tuple(package for package in OPTIONAL if not is_installed(package.module))


def is_installed(module: str) -> bool:
    """Return True if a module can be imported, as far as that shows without importing it."""
    try:
        return find_spec(module) is not None
    except ValueError:  # a module of that name is there and says nothing of where it is from
        return False


def missing_package(wanted_for: str, name: str, instead: str) -> UserError:
    """Return the error of a feature whose package is not installed; `instead` is what works without it."""
    return UserError(f"{wanted_for}: the package {name} is not installed; pip install {name}, or {instead}")
