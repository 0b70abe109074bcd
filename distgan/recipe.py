"""Recipes as text: YAML and `key=value` overrides, read with bounds into plain values."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from distgan.errors import UserError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 32
_MAX_BITS = 1000  # a float holds 1023, and Python refuses to print whole numbers of some 14,000
_MERGE = "tag:yaml.org,2002:merge"
# What PyYAML's constructors raise for text that has the form of a date or number but is none.
_ERRORS = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MiB, as `to_plain` gives it. Raises UserError naming the file."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path}: cannot read the config: {reason}; give the path of a YAML recipe") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: larger than the {_MAX_BYTES} bytes of a recipe; give the path of a YAML recipe")
    try:
        values = _parse(text)
    except _ERRORS as error:
        raise UserError(f"{path}: not valid YAML: {_reason(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}")
    plain: dict[str, Any] = to_plain(values, str(path))
    return plain


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what `section.key=value` says in nested mappings; the value is YAML. Raises UserError."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: expected section.key=value, for example training.steps=1000")
    try:
        value = to_plain(_parse(text), f"override {override[:80]!r}")
    except UserError:
        raise
    except _ERRORS:
        # Globs and brace expansions are what paths look like, and no YAML.
        if not text.startswith(("*", "{")):
            raise UserError(f"override {override[:200]!r}: {text[:80]!r} is not a YAML value") from None
        value = text
    section = values
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {part!r} is not a section")
    section[parts[-1]] = value


def to_plain(values: Any, source: str) -> Any:
    """A copy made of dict with text keys, list, str, int, float, bool and None; other objects become their text.

    Aliases are unfolded: nine lines of YAML can stand for billions of values, or for a list that holds itself.

    Raises:
        UserError: more than 100,000 values, nested more than 32 deep, or a whole number of more than 1000 bits.
    """
    left = _MAX_VALUES

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"{source}: more than {_MAX_VALUES} values once aliases are unfolded; a recipe has few")
        if depth > _MAX_DEPTH:
            raise UserError(f"{source}: nested more than {_MAX_DEPTH} deep, or an alias that contains itself")
        if isinstance(value, Mapping):
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [copy(item, depth + 1) for item in value]
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise UserError(f"{source}: a whole number of {value.bit_length()} bits; no key takes one that large")
        return value if value is None or isinstance(value, (str, int, float)) else str(value)

    return copy(values, 0)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses equal keys, bounds merges, and reads dates as the text they are.

    PyYAML keeps the last of two equal keys without a word; a recipe with two `steps` is a mistake.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._flat: set[int] = set()
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace `<<: *base` and `<<: [*first, *second]` by the pairs of the bases; own pairs, then earlier win."""
        if id(node) in self._flat:
            return
        self._flat.add(id(node))
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        self._refuse_equal_keys(node, own)
        merges = [value for key, value in node.value if key.tag == _MERGE]
        bases = [base for value in merges for base in (value.value if value.id == "sequence" else [value])]
        node.value = own  # what a mapping that merges itself finds
        pairs = []
        for base in reversed(bases):
            if not isinstance(base, yaml.MappingNode):
                raise yaml.constructor.ConstructorError(None, None, "`<<` merges mappings only", node.start_mark)
            self.flatten_mapping(base)
            self._merged += len(base.value)
            if self._merged > _MAX_VALUES:
                raise yaml.constructor.ConstructorError(None, None, "too many merged keys", node.start_mark)
            pairs += base.value
        node.value = pairs + own

    def _refuse_equal_keys(self, node: yaml.MappingNode, pairs: list[tuple[yaml.Node, yaml.Node]]) -> None:
        seen = set()
        for key_node, _ in pairs:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
            seen.add(key)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:300]
