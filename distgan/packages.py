"""Optional packages, and the effect of each missing one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from distgan.errors import UserError


class Optional(NamedTuple):
    """An optional package."""

    name: str
    """Name that pip installs."""
    module: str
    """Name that Python imports."""
    without: str
    """Effect of its absence, for messages."""


OPTIONAL = (
    Optional("simplejpeg", "simplejpeg", "Pillow decodes JPEGs, which is several times slower"),
    Optional("tensorboard", "tensorboard", "scalars go to metrics.jsonl only"),
    Optional("rich", "rich", "plain log lines replace the progress bar"),
    Optional("torch-fidelity", "torch_fidelity", "the detectors inception and vgg16 are not available"),
    Optional("scikit-learn", "sklearn", "`distgan pack builtin:digits` and `distgan probe` are not available"),
)


def missing_packages() -> tuple[Optional, ...]:
    """Return the optional packages that are not installed."""
    return tuple(package for package in OPTIONAL if not is_installed(package.module))


def is_installed(module: str) -> bool:
    """Return True if Python finds a top-level module. It is not imported, so its import may still fail."""
    try:
        return find_spec(module) is not None
    except ValueError:  # sys.modules has a module of this name without a spec
        return False


def missing_package(wanted_for: str, name: str, instead: str) -> UserError:
    """Return the error for a feature whose package is not installed.

    Args:
        wanted_for: key, option or command that needs the package; the message begins with it.
        name: name that pip installs.
        instead: alternative that works without the package, as an imperative.
    """
    return UserError(f"{wanted_for}: the package {name} is not installed; pip install {name}, or {instead}")
