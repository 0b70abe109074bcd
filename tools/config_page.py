"""Write docs/config.md, the page of every config key, from the schema.

Run `python tools/config_page.py`. With `--check` it only compares the page with the schema.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distgan.config.fields import ScheduleConfig
from distgan.config.named import NamedSection
from distgan.config.run import Config

PAGE = Path(__file__).parent.parent / "docs" / "config.md"
INTRODUCTION = """\
# Config keys

This page is generated from the schema by `python tools/config_page.py`. `distgan schema` prints the same as a JSON
Schema, from which editors complete keys in YAML files. Any key can be set on the command line as `section.key=value`.
"""


def page() -> str:
    """Return the whole page, as Markdown."""
    places: dict[type[BaseModel], list[str]] = {}
    for path, section in sections_of(Config):
        places.setdefault(section, []).append(path)
    scheduled = places.pop(ScheduleConfig)
    titles = {section: ", ".join(f"`{path}`" for path in paths) for section, paths in places.items()}
    titles[ScheduleConfig] = "Schedules"
    parts = [INTRODUCTION, f"## Top level\n\n{table(Config, titles)}"]
    for section, title in titles.items():
        parts.append(f"## {title}\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n{table(section, titles)}")
        if issubclass(section, NamedSection) and section.option_fields():
            parts.append(options_table(section, titles))
    parts.append(f"These keys take one: {', '.join(f'`{path}`' for path in scheduled)}.\n")
    return "\n".join(parts)


def sections_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield each section below a model with its dotted path, in the order of the schema."""
    for name, field in keys_of(model).items():
        section = section_of(field.annotation)
        if section is not None:
            yield prefix + name, section
            yield from sections_of(section, f"{prefix}{name}.")


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the keys of a section, and the options of its built-in techniques."""
    options = model.option_fields() if issubclass(model, NamedSection) else {}
    return {**model.model_fields, **options}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, or None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, typing.get_args(annotation))), None)


def table(model: type[BaseModel], titles: dict[type[BaseModel], str]) -> str:
    """Return the table of a section's own keys."""
    rows = ["| key | accepts | default | meaning |", "| --- | --- | --- | --- |"]
    rows += [f"| `{name}` | {' | '.join(cells(field, titles))} |" for name, field in model.model_fields.items()]
    return "\n".join(rows) + "\n"


def options_table(model: type[NamedSection], titles: dict[type[BaseModel], str]) -> str:
    """Return the table of the options of a section's built-in techniques; equal options share a row."""
    owners: dict[tuple[str, ...], list[str]] = {}
    for technique, built_in in model.built_in.items():
        for name, field in built_in.options.model_fields.items():
            owners.setdefault((name, *cells(field, titles)), []).append(f"`{technique}`")
    rows = [f"| option | of `{model.naming_key}` | accepts | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, *others in sorted(owners, key=lambda row: list(model.option_fields()).index(row[0])):
        rows.append(f"| `{name}` | {', '.join(owners[name, *others])} | {' | '.join(others)} |")
    return "\n".join(rows) + "\n"


def cells(field: FieldInfo, titles: dict[type[BaseModel], str]) -> tuple[str, str, str]:
    """Return what a key accepts, its default and its meaning."""
    section, meaning = section_of(field.annotation), " ".join((field.description or "").split())
    if section is not None:
        link = f"[{'schedule' if section is ScheduleConfig else 'section'}](#{anchor(titles[section])})"
        kind = describe(field.annotation).replace("section", link)
        meaning = meaning or (section.__doc__ or "").splitlines()[0]
    else:
        kind = with_bounds(describe(field.annotation), field.metadata)
    return escape(kind), default(field), escape(meaning)


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def describe(annotation: Any) -> str:
    """Return a type in the words of YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return with_bounds(describe(arguments[0]), arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(kind) for kind in arguments)
    if origin in (list, tuple):
        return f"list of {describe(arguments[0])}"
    if origin is dict:
        return f"mapping of {describe(arguments[0])} to {describe(arguments[1])}"
    words = {int: "integer", float: "number", bool: "`true` or `false`", str: "text", types.NoneType: "`null`"}
    return words.get(annotation, "section")


def with_bounds(kind: str, metadata: Iterable[Any]) -> str:
    """Return a type with the tightest of the bounds that its metadata sets."""
    found: dict[str, float] = {}
    for name, value in bounds_of(metadata):
        tighter = max if name in ("ge", "gt") else min
        found[name] = tighter(found.get(name, value), value)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " ".join([kind, *(f"{signs[name]} {number(value)}" for name, value in sorted(found.items()))])


def bounds_of(metadata: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """Yield the bounds in the metadata of a field or type."""
    for item in metadata:
        for name in ("ge", "gt", "le", "lt"):
            value = getattr(item, name, None)
            if value is not None:
                yield name, value
        if isinstance(item, FieldInfo):
            yield from bounds_of(item.metadata)


def number(value: float) -> str:
    """Return a bound, as a power of two where its digits would be hard to read."""
    for base in (value, value + 1):
        if isinstance(value, int) and isinstance(base, int) and base >= 1 << 16 and base.bit_count() == 1:
            return f"2^{base.bit_length() - 1}" + (" - 1" if base != value else "")
    return f"{value:g}"


def default(field: FieldInfo) -> str:
    """Return the default of a key, or `required`."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, ScheduleConfig):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, BaseModel):
        return "its own defaults"
    return f"`{escape(json.dumps(value))}`"


def escape(text: str) -> str:
    """Return text that a cell of a table can hold."""
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page differs from the schema")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE}: differs from the schema; run `python tools/config_page.py`")


if __name__ == "__main__":
    main()
