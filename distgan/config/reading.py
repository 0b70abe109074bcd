"""Recipes to configs and back. Mistakes are one line that names the file, the key and what is accepted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from pydantic import ValidationError

from distgan.config.run import Config
from distgan.errors import UserError
from distgan.recipe import apply_override, read_recipe, to_plain
from distgan.validation import explain


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML recipe, apply ``section.key=value`` overrides (values are YAML), and check it.

    Raises:
        UserError: one line naming the file and key, what was found and what is accepted.
    """
    return parse_config(read_recipe(path), overrides, source=str(path))


def parse_config(values: dict[str, Any], overrides: Iterable[str] = (), *, source: str = "config") -> Config:
    """Check plain values (as YAML or JSON give them) against the schema. Raises UserError."""
    plain = to_plain(values, source)
    for override in overrides:
        apply_override(plain, override)
    try:
        return Config.model_validate(plain)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Config)}") from None


def dump_config(config: Config) -> str:
    """The resolved config, every default written out, as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """Every key of the config, in full, with its plain value: `training.steps` -> 1000."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the config, for editors."""
    return Config.model_json_schema()
