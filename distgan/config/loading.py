"""Recipes to configs and back. Mistakes are one line that names the file, the key and what is accepted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distgan import extensions
from distgan.config.error_messages import explain, naming_key_at, types_of
from distgan.config.run import Config
from distgan.config.yaml_text import read_flow, read_recipe
from distgan.errors import UserError, without_secrets


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML recipe, apply `section.key=value` overrides, and check it.

    A value is taken as typed, without quotes or comments; only for keys that take lists or mappings are `[a, b]` and
    `{a: 1}` YAML. `null` is none where a key may be none. Code that the recipe names by an import path is imported; for
    the config.yaml of a run folder, which may be anyone's, only if its package is allowed (see `extensions.allow`).

    Raises:
        UserError: one line naming the file and key, what was found and what is accepted.
    """
    of_a_run = os.path.basename(path) == "config.yaml" and is_run_folder(Path(path).parent)
    return parse_config(read_recipe(path), overrides, source=str(path), trust=not of_a_run)


def parse_config(
    values: dict[str, Any], overrides: Iterable[str] = (), *, source: str = "config", trust: bool = False
) -> Config:
    """Check plain values (as YAML or JSON give them) against the schema.

    Args:
        trust: the user wrote the values, so that the import paths in them are allowed. Those in overrides always are.

    Raises:
        UserError: one line naming the file or override and the key.
    """
    plain, overrides = dict(values), list(overrides)
    for override in overrides:
        extensions.trust_paths_in(override.partition("=")[2])
        apply_override(plain, override)
    try:
        with extensions.distrusting(not trust):
            return Config.model_validate(plain)
    except ValidationError as error:
        key, line = explain(error, Config)
        given = [override for override in overrides if _concerns(override.partition("=")[0], key, line)]
        where = f"override {without_secrets(given[-1])[:200]!r}" if given else source
        raise UserError(f"{where}: {line}") from None


def _concerns(overridden: str, key: str, line: str) -> bool:
    """Return True if a line about a key is about what an override set: the key, a section of it, or an option in it."""
    return f"{key}.".startswith(f"{overridden}.") or line.startswith((f"{overridden}:", f"{overridden} "))


def is_run_folder(folder: Path) -> bool:
    """Return True if a run has written to the folder. A config.yaml alone can be a recipe of the user."""
    return any((folder / name).exists() for name in ("status.json", "checkpoints"))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key in `values`. The sections on the way to it are copied first, because they are the caller's.

    Raises UserError if the text is no `section.key=value`, or no value for this key.
    """
    shown = f"override {without_secrets(override)[:200]!r}"
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{shown}: expected section.key=value, for example training.steps=1000")
    section = values
    for depth, part in enumerate(parts[:-1], start=1):
        inner = section.get(part)
        naming_key = naming_key_at(parts[:depth], Config)
        if isinstance(inner, str) and naming_key is not None:
            inner = {naming_key: inner}  # a name alone stands for a section
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{shown}: {part!r} is not a section")
        section[part] = dict(inner or {})
        section = section[part]
    section[parts[-1]] = _override_value(text, types_of(parts, Config), shown)


def _override_value(text: str, types: set[Any], source: str) -> Any:
    """What the text of an override means for a key of these types."""
    is_text = str in types
    # Not an empty one, which an unset variable of a shell leaves.
    if text == "null":
        if is_text and type(None) not in types:
            raise UserError(f"{source}: this key cannot be null; write ./null for a file or folder of that name")
        return None
    opening = text.lstrip()[:1]
    if (opening == "[" and types & {list, tuple}) or (opening == "{" and dict in types):
        try:
            return read_flow(text, source)
        except UserError:
            if not is_text:  # a path may begin with a bracket, as [ab]*.tar does
                raise
    return text


def dump_config(config: Config) -> str:
    """The resolved config, every default written out, as YAML that `load_config` reads back to an equal object.

    Only secrets in URLs are left out; see `plain_values`.
    """
    return yaml.safe_dump(plain_values(config), sort_keys=False)


def plain_values(config: Config) -> dict[str, Any]:
    """The config as JSON has it, for files and messages that others read: URLs without user, password and query."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(item) for key, item in value.items()}
        if isinstance(value, list):
            return [public(item) for item in value]
        return without_secrets(value) if isinstance(value, str) else value

    values: dict[str, Any] = public(config.model_dump(mode="json"))
    return values


def flatten(config: Config) -> dict[str, Any]:
    """Every key of the config, in full, with its plain value: `training.steps` -> 1000."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(plain_values(config), ""))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the config, for editors."""
    return Config.model_json_schema()
