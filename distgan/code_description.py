"""Description of code without a source file, such as that of a notebook, to tell whether it changed."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
_MANY = 1000


def describe_code(thing: Any, scope: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that describe a class or function of `__main__`, and all that it uses of `scope`, its globals.

    Functions are described by their source, which IPython keeps for each cell; without it, by their bytecode, which
    depends on the version of Python. Code of other modules is described by its name, and objects other than plain
    values by their type.
    """
    yield from _described(thing, scope, set())


def _described(thing: Any, scope: Mapping[str, Any], seen: set[int]) -> Iterator[str]:
    if isinstance(thing, _PLAIN):
        yield repr(thing)
    elif id(thing) not in seen:
        # Equal constants may be one object or two, so these are described each time.
        if not isinstance(thing, (CodeType, tuple, frozenset)):
            seen.add(id(thing))
        yield type(thing).__name__
        for part in _parts(thing, scope):
            yield from _described(part, scope, seen)


def _parts(thing: Any, scope: Mapping[str, Any]) -> list[Any]:
    """Return what a thing is described by."""
    if isinstance(thing, (type, FunctionType)) and thing.__module__ != "__main__":
        return [thing.__module__, thing.__qualname__]
    if isinstance(thing, FunctionType):
        used = [part for name in sorted(_globals(thing.__code__)) if name in scope for part in (name, scope[name])]
        held = [thing.__defaults__, thing.__kwdefaults__, *map(_contents, thing.__closure__ or ())]
        return [_source(thing) or thing.__code__, *held, *used]
    if isinstance(thing, type):
        own = {name: part for name, part in sorted(vars(thing).items()) if not name.endswith("__") or callable(part)}
        return [thing.__qualname__, *thing.__bases__, *own, *own.values()]
    if isinstance(thing, CodeType):
        return [thing.co_name, thing.co_code, thing.co_names, thing.co_varnames, *thing.co_consts]
    if isinstance(thing, (staticmethod, classmethod)):
        return [thing.__func__]
    if isinstance(thing, property):
        return [thing.fget, thing.fset]
    if isinstance(thing, (tuple, list)) and len(thing) <= _MANY:
        return [*thing]
    if isinstance(thing, dict) and len(thing) <= _MANY:
        return [part for item in thing.items() for part in item]
    if isinstance(thing, (set, frozenset)) and len(thing) <= _MANY:
        return sorted(map(repr, thing))  # their order differs between processes
    return []


def _source(function: FunctionType) -> str | None:
    try:
        return inspect.cleandoc(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _globals(code: CodeType) -> set[str]:
    """Return the names of the globals that a function uses, or a function inside it."""
    used = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return used.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not assigned yet
        return None


def source_files(root: Path) -> list[Path]:
    """Return the Python files below a folder, without hidden ones, such as the locks and copies that editors leave."""
    found = (path for path in root.rglob("*.py") if not any(part[0] == "." for part in path.relative_to(root).parts))
    return [path for path in found if path.is_file()]
