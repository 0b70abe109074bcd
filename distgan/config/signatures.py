"""The schema of a technique's options, read from the signature of the user's class or function."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic_core import to_jsonable_python

from distgan.config.fields import Real, Section, number, plain_value
from distgan.errors import UserError

_Plain = Annotated[Any, BeforeValidator(plain_value)]
_Integer = Annotated[int, BeforeValidator(number)]


@cache
def schema_of(
    path: str, technique: Callable[..., Any], given: int, base: type[Section], offered: tuple[str, ...] = ()
) -> type[Section]:
    """Return the schema of a technique's options: its parameters after the first `given`, without those `offered`.

    Annotations (with `Annotated` bounds) and defaults are those of the signature; `**kwargs` accepts any option. Class
    variables of `base` are taken over from attributes of the technique.

    Raises:
        UserError: the signature cannot be read, or the technique does not take what distgan passes.
    """
    try:
        parameters = list(inspect.signature(technique).parameters.values())
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its signature cannot be read: {error}") from None
    kinds = [parameter.kind for parameter in parameters]
    in_order = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(in_order) < given and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise UserError(f"{path}: takes {len(in_order)} positional parameters, expected at least {given}")
    fields: dict[str, Any] = {}
    for parameter in (*in_order[given:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)):
        name = parameter.name
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(f"{path}: its parameter {name!r} is positional only; options are passed by name")
        if name in offered:
            continue
        if name.startswith("_") or hasattr(base, name):
            raise UserError(f"{path}: its parameter {name!r} has a name that is taken; rename it in the code")
        default = ... if parameter.default is parameter.empty else parameter.default
        if not _is_plain(default):
            raise UserError(
                f"{path}: its parameter {name!r} has the default {str(default)[:60]!r}, which no recipe holds; use a "
                "finite number, text, true, false, none, or a list or mapping of these"
            )
        fields[name] = (_hint(path, technique, parameter), default)
    facts = _facts(path, technique, base)
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    settings = ConfigDict(extra="allow" if takes_any else "forbid", arbitrary_types_allowed=True)
    members: dict[str, Any] = {"__module__": __name__, "model_config": settings}
    if takes_any:
        members["__annotations__"] = {"__pydantic_extra__": dict[str, _Plain]}
    try:
        root = type(f"{base.__name__}Of", (base,), members)
        schema: type[Section] = create_model(path, __base__=root, **fields)
    except (TypeError, ValueError, NameError) as error:
        raise UserError(f"{path}: its signature cannot be read: {error}") from None
    for name, value in facts.items():
        setattr(schema, name, value)
    return schema


def _is_plain(value: Any) -> bool:
    """Return True if a checkpoint can hold a default: JSON has no infinity, and no classes or tensors."""
    if value is ... or isinstance(value, BaseModel):
        return True
    try:
        json.dumps(to_jsonable_python(value), allow_nan=False)
    except (ValueError, TypeError):  # pydantic's errors are of these kinds
        return False
    return not isinstance(value, (bytes, type))


def _hint(path: str, technique: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the type of one option. Numbers are read as those of a recipe, decimal and finite."""
    if parameter.annotation is parameter.empty:
        return str if isinstance(parameter.default, str) else _Plain
    function = technique.__init__ if inspect.isclass(technique) else technique

    # Only this one, because others may name what is imported for type checkers alone.
    def alone() -> None: ...

    alone.__annotations__ = {parameter.name: parameter.annotation}
    try:
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        hint = typing.get_type_hints(alone, scope, include_extras=True)[parameter.name]
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise UserError(f"{path}: its signature cannot be read: {error}") from None
    return {int: _Integer, float: Real}.get(hint, hint)


def _facts(path: str, technique: Callable[..., Any], base: type[Section]) -> dict[str, Any]:
    """Return the facts that a technique sets as attributes. Raises UserError for a value of another type."""
    hints = typing.get_type_hints(base, include_extras=True)
    facts = {}
    properties = {name for name in dir(base) if isinstance(inspect.getattr_static(base, name), property)}
    for name in (base.__class_vars__ - {"takes_effect_with"}) | (properties - set(dir(BaseModel))):
        value = inspect.getattr_static(technique, name, None)
        if value is None or isinstance(value, property):
            continue
        hint = typing.get_args(hints[name])[0] if name in hints else _property_type(base, name)
        try:
            value = tuple(value) if isinstance(value, list) else value
            facts[name] = TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"{path}: {name} = {value!r}: {said[0].lower()}{said[1:]}") from None
    return facts


def _property_type(base: type[Section], name: str) -> Any:
    getter = inspect.getattr_static(base, name).fget
    return typing.get_type_hints(getter)["return"]
