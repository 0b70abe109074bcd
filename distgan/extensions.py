"""Code of users: import paths such as `my_package.nets:MyGenerator`, which packages are trusted, and their digests.

Importing a module runs its code. A module is imported only if the user's own recipe names it, or if the user allows its
top-level package by name; never because a checkpoint, an export or a run folder that somebody handed over names it.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distgan.errors import UserError, printable

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_OWN = "distgan"
_allowed: set[str] = {_OWN}
_trusting: list[bool] = [False]


def is_import_path(name: str) -> bool:
    """Return True if a name has the form of an import path, `package.module:Name`."""
    return _PATH.fullmatch(name) is not None


def package_of(path: str) -> str:
    """Return the top-level package of an import path."""
    return path.partition(":")[0].partition(".")[0]


def allow(*packages: str) -> None:
    """Trust packages, and everything in them, for the rest of the process.

    Raises:
        UserError: a name is not that of a top-level package.
    """
    for package in packages:
        if not package.isidentifier():
            raise UserError(
                f"--allow {printable(package)[:100]}: expected the name of a top-level package, such as my_package"
            )
        _allowed.add(package)


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Allow every package that is named inside, because the user wrote the names."""
    _trusting.append(trust)
    try:
        yield
    finally:
        _trusting.pop()


def is_trusting() -> bool:
    """Return True inside `trusting`: what is read now is the user's own."""
    return _trusting[-1]


def is_allowed(path: str) -> bool:
    """Return True if the code at an import path may be imported. Inside `trusting`, this allows its package."""
    if _trusting[-1]:
        _allowed.add(package_of(path))
    return package_of(path) in _allowed


def load(path: str) -> Callable[..., Any]:
    """Import and return what an import path names.

    Raises:
        UserError: the package is not allowed, the module or the name does not exist, or importing it fails.
    """
    module, _, name = path.partition(":")
    if not is_allowed(path):
        package = package_of(path)
        raise UserError(
            f"{path}: code of the package {package}, which was not run, because anyone may have written the file that "
            f"names it; if you trust the package, add --allow {package}, or call distgan.allow({package!r})"
        )
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"{path}: there is no module {error.name}; install its package, or add its folder to PYTHONPATH"
            ) from None
        raise _import_failed(path, error) from error
    except Exception as error:  # whatever a stranger's module raises
        raise _import_failed(path, error) from error
    for part in name.split("."):
        if not hasattr(found, part):
            known = [public for public in vars(found) if not public.startswith("_")][:10]
            raise UserError(f"{path}: {module} has no {name}; it has {', '.join(known) or 'no public name'}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{path}: found {type(found).__name__}, expected a class or a function")
    return found  # type: ignore[no-any-return]


def import_path(thing: Callable[..., Any]) -> str:
    """Return the import path of a class or function that Python code passed, and allow its package.

    Raises:
        UserError: it cannot be imported by a path, because it was defined inside a function.
    """
    path = f"{thing.__module__}:{thing.__qualname__}"
    if not is_import_path(path):
        raise UserError(f"{path}: cannot be imported by this path; define it at the top level of a module")
    with trusting():
        load(path)
    return path


@cache
def package_digest(package: str) -> str:
    """Return the SHA-256 of the names and contents of a package's Python sources, in hexadecimal.

    A module without a source file, as in a notebook, has the digest of nothing.
    """
    digest = hashlib.sha256()
    for name, source in _sources(package):
        content = source.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _sources(package: str) -> list[tuple[str, Path]]:
    if package == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        return [("__main__", Path(file))] if file and Path(file).is_file() else []
    spec = find_spec(package)
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        return [(package, Path(spec.origin))] if spec.origin and Path(spec.origin).is_file() else []
    roots = map(Path, spec.submodule_search_locations)
    return sorted((path.relative_to(root).as_posix(), path) for root in roots for path in root.rglob("*.py"))


def _import_failed(path: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:300]
    return UserError(f"{path}: importing it failed: {type(error).__name__}: {said}")
