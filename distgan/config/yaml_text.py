"""Recipes as text: YAML of which only null, lists and mappings have a meaning of their own.

All other scalars stay the text that they are: the type of a key decides what it means. So a folder may be named `no`,
`010` or `1e-4`, which YAML 1.1 would turn into a boolean, the number 8 and a string, and YAML 1.2 into other values.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from distgan.errors import UserError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 32
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_KNOWN_TAGS = (_NULL, _TEXT, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class _Loader(yaml.BaseLoader):
    """PyYAML up to its tree of nodes; nothing is constructed."""


_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MiB, of dict, list, str and None. Raises UserError naming the file."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except IsADirectoryError:
        recipe = os.path.join(path, "config.yaml")
        fix = f"name the recipe in it, {recipe}" if os.path.isfile(recipe) else "give the path of a YAML recipe"
        raise UserError(f"{path}: found a folder, expected a recipe; {fix}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        # `distgan train training.steps=5` takes the override for the recipe.
        first = "give the recipe first, then key=value" if "=" in os.fspath(path) else "give the path of a YAML recipe"
        raise UserError(f"{path}: cannot read the config: {reason}; {first}") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: larger than the {_MAX_BYTES} bytes of a recipe; give the path of a YAML recipe")
    try:
        values = _plain(yaml.compose(text, Loader=_Loader), str(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {_reason(error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else "a list" if isinstance(values, list) else "text"
        raise UserError(f"{path}: a recipe is a mapping of sections, found {found}")
    return values


def read_flow(text: str, source: str) -> Any:
    """A list `[a, b]` or mapping `{a: 1}` of YAML as dict, list, str and None. Raises UserError naming the source."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        # What stands behind it would be a comment, and ignored.
        if node is not None and node.end_mark.index == len(text.rstrip()):
            return _plain(node, source)
        reason = "expected nothing behind the closing bracket"
    except (yaml.YAMLError, RecursionError) as error:
        reason = _reason(error)
    raise UserError(f"{source}: not a YAML value such as [a, b] or {{a: 1, b: 2}}: {reason}")


def _plain(root: yaml.Node | None, source: str) -> Any:
    """What a tree of nodes stands for. Aliases are unfolded: nine lines of YAML can stand for billions of values.

    Raises:
        UserError: equal keys, a tag, a merge key, more than 100,000 values, or nested more than 32 deep.
    """
    left = _MAX_VALUES

    def refuse(node: yaml.Node, what: str) -> UserError:
        return UserError(f"{source}: not valid YAML: line {node.start_mark.line + 1}: {what}")

    def check_tag(node: yaml.Node) -> None:
        if node.tag not in _KNOWN_TAGS:
            raise refuse(node, f"the tag {node.tag[:80]!r}: a recipe has no tags; remove it")

    def build(node: yaml.Node, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"{source}: more than {_MAX_VALUES} values once aliases are unfolded; a recipe has few")
        if depth > _MAX_DEPTH:
            raise UserError(f"{source}: nested more than {_MAX_DEPTH} deep, or an alias that contains itself")
        check_tag(node)
        if isinstance(node, yaml.MappingNode):
            return mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [build(item, depth + 1) for item in node.value]
        return None if node.tag == _NULL else node.value

    def mapping(node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise refuse(key, "a key is not a word")
            check_tag(key)
            if key.value == "<<":
                raise refuse(key, "merge keys (<<) are not of YAML 1.2; write the keys out")
            if key.value in built:
                raise refuse(key, f"the key {key.value[:80]!r} is given twice; remove one")
            built[key.value] = build(value, depth + 1)
        return built

    return None if root is None else build(root, 0)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:300]
