"""What is wrong with a configuration, in one line that names the key and what is accepted."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distgan.config.named import NamedSection


def explain(error: ValidationError, root: type[BaseModel]) -> tuple[str, str]:
    """Return the key of the first mistake, and one line about it that says how many more keys are wrong."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    location = _location(first["loc"], root)
    key = ".".join(location)
    found = first["input"]
    kind = first["type"]
    if kind == "extra_forbidden":
        line = f"unknown key {key[:200]!r}; {_nearest(location, root)}"
    elif kind == "missing":
        line = f"{key!r} is missing; it has no default"
    elif kind == "value_error":
        # Checks of a whole section name the field themselves.
        section = _section_at(location, root) if location else None
        whole = isinstance(found, (dict, BaseModel)) or (section is not None and issubclass(section, NamedSection))
        joint = "." if whole else ": "
        line = f"{key}{joint if key else ''}{first['ctx']['error']}"
    elif kind == "model_type" and found in (None, ""):
        line = f"{key} is empty; {_needs(_section_at(location, root))}"
    elif key and (kind in _STRUCTURES or kind == "model_type"):
        section = _section_at(location, root) if kind == "model_type" else None
        expected = f"a section with the keys {', '.join(section.model_fields)}" if section else _STRUCTURES[kind]
        line = f"{key} = {_shown(found, kind)[:80]}: expected {expected}"
    else:
        line = f"{key} = {_shown(found, kind)[:80]}: {_message(first)}" if key else _message(first)
    others = len({tuple(_location(e["loc"], root)) for e in errors}) - 1
    return key, line if not others else f"{line} (and {others} more)"


_STRUCTURES = {
    "list_type": "a list such as [a, b]",
    "tuple_type": "a list such as [0.5, 0.9]",
    "dict_type": "a mapping such as {16: 32}",
}


def _shown(found: Any, kind: str) -> str:
    """As it is written in a recipe, whose numbers are text until their key has been looked at."""
    if isinstance(found, float) and math.isnan(found):
        return "nan"
    is_number = isinstance(found, str) and not kind.endswith("_type") and re.fullmatch(r"[-+.\deE]+", found, re.ASCII)
    return str(found) if is_number else repr(found)


def types_of(location: Sequence[str], root: type[BaseModel]) -> set[Any]:
    """What a key takes: the members of its union, without the items' types; sections are dict. Empty if unknown."""
    section = _section_at(list(location[:-1]), root)
    field = _fields(section).get(location[-1]) if section else None
    if field is None:
        # It may be an option of a user's code, of any type.
        return {list, dict} if section is not None and issubclass(section, NamedSection) else set()
    return set(_members(field.annotation))


def naming_key_at(location: Sequence[str], root: type[BaseModel]) -> str | None:
    """Key that names the technique of a section; None if it is no section of a technique."""
    section = _section_at(list(location), root)
    return section.naming_key if section is not None and issubclass(section, NamedSection) else None


def _members(annotation: Any) -> list[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _members(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [member for argument in arguments for member in _members(argument)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [dict]
    return [origin or annotation]


def _location(parts: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The key alone: pydantic also names the member of a union (`str`) and the validator that refused."""
    section: Any = root
    location = []
    for part in parts:
        if isinstance(part, int):
            location.append(str(part))
        elif section is not None:
            location.append(part)
            field = _fields(section).get(part)
            section = _section_of(field.annotation) if field else None
    return location


def _message(error: Any) -> str:
    if error["type"] == "too_short":
        bounds = error["ctx"]
        return f"expected a list of {bounds['min_length']} or more, found {bounds['actual_length']}"
    message: str = error["msg"]
    limit = error.get("ctx", {}).get("le")
    # 19 digits are hard to read.
    for bound, shown in ((1, " - 1"), (0, "")):
        if isinstance(limit, int) and limit >= 1 << 20 and (limit + bound).bit_count() == 1:
            message = message.replace(str(limit), f"2**{(limit + bound).bit_length() - 1}{shown}")
    return message[0].lower() + message[1:]


def _needs(section: type[BaseModel] | None) -> str:
    required = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
    return f"it needs: {', '.join(required)}" if required else "give it a key, or leave it out"


def _nearest(location: list[str], root: type[BaseModel]) -> str:
    """The valid name nearest to an unknown one: in its own section first, then anywhere."""
    section: Any = _section_at(location[:-1], root) or root
    names = list(section.model_fields)
    close = difflib.get_close_matches(location[-1][:100], names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join([*location[:-1], close[0]])!r}?"
    # The shallowest key of each name comes first, and training's before others of its depth.
    ranked = sorted(_all_keys(root), key=lambda name: (name.count("."), not name.startswith("training.")), reverse=True)
    elsewhere = {name.rpartition(".")[2]: name for name in ranked}
    close = difflib.get_close_matches(location[-1][:100], list(elsewhere), n=1, cutoff=0.8)
    if close:
        return f"did you mean {elsewhere[close[0]]!r}?"
    return f"accepted here: {', '.join(names)}"


def _section_at(location: list[str], root: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for part in location:
        if part.isdecimal():  # an item of a list
            continue
        field = _fields(section).get(part) if section else None
        section = _section_of(field.annotation) if field else None
    return section


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section, and the options of its built-in techniques."""
    options = section.option_fields() if issubclass(section, NamedSection) else {}
    return {**options, **section.model_fields}


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, typing.get_args(annotation))), None)


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in _fields(section).items():
        keys.append(prefix + name)
        inner = _section_of(field.annotation)
        if inner is not None:
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys
