"""Code of users: import paths such as `my_package.nets:MyGenerator`, which packages are trusted, and their digests.

Importing a module runs its code. A module is imported only if the user wrote its path in a recipe, an override or a
program, or allows its top-level package by name; never because a checkpoint, an export or a run folder that somebody
handed over names it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from distgan.code_description import describe_code, source_files
from distgan.errors import UserError, printable

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_OPTIMIZERS = "torch.optim:"
_packages: set[str] = set()
"""Packages that the user allowed by name."""
_paths: set[str] = set()
"""Import paths that the user wrote."""
_distrusting = [False]


def is_import_path(name: str) -> bool:
    """Return True if a name has the form of an import path, `package.module:Name`."""
    return _PATH.fullmatch(name) is not None


def package_of(path: str) -> str:
    """Return the top-level package of an import path."""
    return path.partition(":")[0].partition(".")[0]


def allow(*packages: str) -> None:
    """Trust the code of packages for the rest of the process.

    Raises:
        UserError: a name is not that of a top-level package.
    """
    for package in packages:
        if not package.isidentifier():
            raise UserError(
                f"--allow {printable(package)[:100]}: expected the name of a top-level package, such as my_package"
            )
        _packages.add(package)


@contextmanager
def allowing(*packages: str) -> Iterator[None]:
    """Trust the code of packages inside. Raises UserError as `allow` does."""
    before = set(_packages)
    try:
        allow(*packages)
        yield
    finally:
        _packages.intersection_update(before)


@contextmanager
def distrusting(distrust: bool = True) -> Iterator[None]:
    """Read a file that anyone may have written: import paths in it are not the user's."""
    _distrusting.append(distrust)
    try:
        yield
    finally:
        _distrusting.pop()


def is_distrusting() -> bool:
    """Return True inside `distrusting`."""
    return _distrusting[-1]


def trust_paths_in(text: str) -> None:
    """Trust the import paths in a text that the user wrote."""
    _paths.update(_PATH.findall(text))


def is_written(path: str) -> bool:
    """Return True if the user wrote this import path in a recipe, an override or a program."""
    return path in _paths


def is_allowed(path: str) -> bool:
    """Return True if the user wrote this import path or allowed its package. Optimizers of torch are always allowed."""
    is_optimizer = path.startswith(_OPTIMIZERS) and "." not in path.removeprefix(_OPTIMIZERS)
    return path in _paths or package_of(path) in _packages or is_optimizer


def load(path: str, *, built_in: bool = False) -> Callable[..., Any]:
    """Import and return what an import path names.

    Args:
        built_in: the path is from distgan's own tables.

    Raises:
        UserError: the path is not allowed, the module or the name does not exist, importing it fails, or it leads to
            code of another package that is not allowed.
    """
    module, _, name = path.partition(":")
    if not built_in and not is_allowed(path):
        raise _not_allowed(path, package_of(path))
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"{path}: there is no module {error.name}; install its package, or add its folder to PYTHONPATH"
            ) from None
        raise _import_failed(path, error) from error
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises
        raise _import_failed(path, error) from error
    for part in name.split("."):
        if not hasattr(found, part) and module == "__main__":
            raise UserError(
                f"{path}: it was defined in a notebook or script, and not in this one; run its definition first, or "
                "move it into a module and train again with that path"
            )
        if not hasattr(found, part):
            public = [own for own in dir(found) if not own.startswith("_")]
            own = [one for one in public if getattr(getattr(found, one), "__module__", None) == module] or public
            near = difflib.get_close_matches(part, public, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{path}: {module} has no {name}; {guess}it has {', '.join(own[:10]) or 'no public name'}")
        found = getattr(found, part)
        if isinstance(found, ModuleType):
            raise UserError(f"{path}: {part} is a module; name its own path, such as {found.__name__}:Name")
    if not callable(found):
        raise UserError(f"{path}: found {type(found).__name__}, expected a class or a function")
    owner = str(getattr(found, "__module__", None)).partition(".")[0]
    # A module of an allowed package can hold what it imported from another one, such as os.system.
    if not built_in and path not in _paths and owner != package_of(path) and owner not in _packages:
        raise _not_allowed(path, owner)
    return found  # type: ignore[no-any-return]


def import_path(thing: Callable[..., Any]) -> str:
    """Return the import path of a class or function that Python code passed, and trust it.

    Raises:
        UserError: it cannot be imported by a path, because it was defined inside a function or made by a call.
    """
    path = f"{getattr(thing, '__module__', None)}:{getattr(thing, '__qualname__', '')}"
    if is_import_path(path):
        _paths.add(path)
        if load(path) is thing:
            return path
    shown = printable(repr(thing))[:100]
    raise UserError(f"{shown}: cannot be imported by a path; define it at the top level of a module")


def code_digest_of(path: str) -> str:
    """Return the SHA-256 of the code that an import path names, in hexadecimal.

    It is that of the names and contents of all Python sources of its package. Without a source file, as in a notebook,
    it is that of the definition's compiled code, and of what it uses of the notebook.
    """
    if package_of(path) == "__main__" and not _sources("__main__"):
        main = vars(sys.modules["__main__"])
        described = "\n".join(describe_code(main.get(path.partition(":")[2].partition(".")[0]), main))
        return hashlib.sha256(described.encode()).hexdigest()
    return package_digest(package_of(path))


def code_digests(paths: Iterable[str]) -> dict[str, str]:
    """Return the digests of the packages of import paths, by package."""
    digests: dict[str, list[str]] = {}
    for path in sorted({*paths}):
        digests.setdefault(package_of(path), []).append(code_digest_of(path))
    return {
        package: found[0] if len({*found}) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()
        for package, found in digests.items()
    }


def refresh_digests() -> None:
    """Read the sources again when their digest is next asked for. Call it where a run or an evaluation begins.

    During one the digests stay those of its beginning: who edits a package while it trains does not change what runs.
    """
    package_digest.cache_clear()


@cache
def package_digest(package: str) -> str:
    """Return the SHA-256 of the names and contents of a package's Python sources, in hexadecimal."""
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
    return sorted((path.relative_to(root).as_posix(), path) for root in roots for path in source_files(root))


def _not_allowed(path: str, package: str) -> UserError:
    return UserError(
        f"{path}: code of the package {package}, which was not run, because anyone may have written the file that "
        f"names it; if you trust the package, add --allow {package}, call distgan.allow({package!r}), or pass "
        f"trust_code=[{package!r}] to load_generator"
    )


def _import_failed(path: str, error: BaseException) -> UserError:
    said = " ".join(str(error).split())[:300]
    return UserError(f"{path}: importing it failed: {type(error).__name__}: {said}")
