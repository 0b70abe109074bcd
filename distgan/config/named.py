"""Sections that name a technique and hold its options: a built-in one, or the user's by its import path.

The signature of the technique is the schema of its options. Built-in techniques declare the same schema as a class, so
that a config is read without importing torch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from distgan import extensions
from distgan.config.fields import Section
from distgan.config.signatures import schema_of
from distgan.errors import UserError, blaming_code


class BuiltIn(NamedTuple):
    """A built-in technique."""

    path: str
    """Import path of its class or function."""
    options: type[Any]
    """Schema of its options, equal to the signature."""


class NamedSection(Section):
    """A section whose key `naming_key` names a built-in technique or an import path. Its other keys are the options.

    Options of code that is not allowed are kept as they are; they are checked when the code is loaded.
    """

    model_config = ConfigDict(extra="allow")

    naming_key: ClassVar[str]
    built_in: ClassVar[Mapping[str, BuiltIn]]
    given: ClassVar[tuple[str, ...]] = ()
    """Leading positional parameters that distgan passes; the others are options."""
    offered: ClassVar[tuple[str, ...]] = ()
    """Parameters that distgan passes by name to a technique that has them; they are no options."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Further names, which the section replaces by a built-in technique and its options."""
    facts_base: ClassVar[type[Section]] = Section
    """Base class of options. Its class variables and properties are facts about the technique. A user's class sets its
    own as attributes."""

    _options: Any = PrivateAttr(None)

    @property
    def technique(self) -> str:
        """Name of the built-in technique, or import path."""
        found: str = getattr(self, self.naming_key)
        return found

    @property
    def is_built_in(self) -> bool:
        """Whether the technique is one of distgan's."""
        return self.technique in self.built_in

    @property
    def path(self) -> str:
        """Import path of the technique."""
        return self.built_in[self.technique].path if self.is_built_in else self.technique

    @property
    def is_allowed(self) -> bool:
        """Whether the technique's code may run; see `extensions`."""
        return self.is_built_in or extensions.is_allowed(self.technique)

    @property
    def options(self) -> Any:
        """The validated options, an instance of `facts_base`. Raises UserError if the code is not allowed."""
        if self._options is None:
            self._options = self._schema().model_validate(self.__pydantic_extra__)
        return self._options

    @property
    def arguments(self) -> dict[str, Any]:
        """The validated options by name. Raises UserError if the code is not allowed."""
        options = self.options
        return {key: getattr(options, key) for key in type(options).model_fields} | (options.model_extra or {})

    @property
    def facts(self) -> Any:
        """The options, or an instance of `facts_base` if the code is not allowed or cannot be loaded."""
        if self._options is None and not self.is_allowed:
            return self.facts_base()
        try:
            return self.options
        except UserError:
            return self.facts_base()

    def load(self) -> Callable[..., Any]:
        """Return the class or function. Raises UserError if it is not allowed or cannot be imported."""
        return extensions.load(self.path, built_in=self.is_built_in)

    def asks_for(self, parameter: str) -> bool:
        """Return True if the technique has this one of the parameters in `offered`."""
        return parameter in inspect.signature(self.load()).parameters

    def build(self, *given: Any, technique: Callable[..., Any] | None = None, **offers: Any) -> Any:
        """Call the technique, or one in its place, with what distgan passes and with the options.

        Args:
            offers: values of the parameters in `offered`.

        Raises:
            UserError: its code is not allowed or cannot be imported, or a user's technique raised something.
        """
        found, passed = technique or self.load(), self.arguments
        if offers:
            passed |= {key: offers[key] for key in offers.keys() & inspect.signature(found).parameters.keys()}
        with self.blaming("cannot be made with these options"):
            return found(*given, **passed)

    def blaming(self, what: str) -> AbstractContextManager[None]:
        """Return a context manager in which an exception of a user's technique is a UserError that says `what`."""
        return nullcontext() if self.is_built_in else blaming_code(f"{self.technique}: {what}")

    def __getstate__(self) -> dict[Any, Any]:
        # The class of a user's options is made at run time, so that another process cannot import it. What the user
        # allowed here is also allowed in this program's data loader workers.
        return {**super().__getstate__(), "__pydantic_private__": {"_options": None}, "is_allowed": self.is_allowed}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        if state.pop("is_allowed") and not self.built_in.get(state["__dict__"][self.naming_key]):
            extensions.trust_paths_in(state["__dict__"][self.naming_key])
        super().__setstate__(state)

    def _schema(self) -> type[Section]:
        if self.is_built_in:
            return self.built_in[self.technique].options
        return schema_of(self.technique, self.load(), len(self.given), self.facts_base, self.offered)

    @model_validator(mode="before")
    @classmethod
    def _accept_a_name_or_class(cls, values: Any) -> Any:
        if isinstance(values, str) or (callable(values) and not isinstance(values, BaseModel)):
            values = {cls.naming_key: values}
        if isinstance(values, Mapping) and callable(values.get(cls.naming_key)):
            values = {**values, cls.naming_key: extensions.import_path(values[cls.naming_key])}
        return values

    @model_serializer(mode="wrap")
    def _write_a_name_alone_as_text(self, write: SerializerFunctionWrapHandler) -> Any:
        values = write(self)
        return values[self.naming_key] if values.keys() == {self.naming_key} else values

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        extra, key = self.__pydantic_extra__, self.naming_key
        assert extra is not None
        if not self.is_built_in:
            if ":" not in self.technique:
                known = [*self.built_in, *self.aliases]
                near = difflib.get_close_matches(self.technique[:100], known, n=1)
                package, _, last = self.technique[:100].rpartition(".")
                near += [f"{package}:{last}"] if package else []
                guess = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"{key}: {self.technique[:100]!r} is not known; {guess}choose {', '.join(known)}, or the "
                    "import path of your own, such as my_package.module:Name"
                )
            if not extensions.is_import_path(self.technique):
                raise ValueError(f"{key}: {self.technique[:100]!r} is no import path, such as my_package.module:Name")
            if not extensions.is_distrusting():
                extensions.trust_paths_in(self.technique)
            if not self.is_allowed:
                return self
        try:
            schema = self._schema()
        except UserError as error:
            if extensions.is_distrusting() and not extensions.is_written(self.technique):
                return self  # a run's generator loads without the code of its discriminator
            raise ValueError(f"{key}: {error}") from None
        taken = sorted(schema.model_fields.keys() & type(self).model_fields)
        if taken:
            raise ValueError(
                f"{key}: {self.technique}: its parameter {taken[0]!r} is also a key here; rename it in the code"
            )
        for unknown in extra.keys() - schema.model_fields.keys():
            if schema.model_config.get("extra") != "allow":
                raise ValueError(f"{unknown[:100]}: {self._no_such_option(unknown, schema)}")
        checked = self._options = schema.model_validate(extra)
        extra.clear()
        extra.update({field: getattr(checked, field) for field in schema.model_fields} | (checked.model_extra or {}))
        return self

    def _no_such_option(self, unknown: str, schema: type[Section]) -> str:
        said = f"no option of {self.naming_key}: {self.technique}"
        owners = [name for name, built_in in self.built_in.items() if unknown in built_in.options.model_fields]
        if owners:
            return f"{said}, only of {' or '.join(owners)}; leave it out, or change {self.naming_key}"
        keys = [*type(self).model_fields, *schema.model_fields]
        near = difflib.get_close_matches(unknown[:100], keys, n=1, cutoff=0.5)
        return f"{said}; did you mean {near[0]!r}?" if near else f"{said}; accepted here: {', '.join(keys)}"

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Add the options of all built-in techniques, for editors."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        for built_in in cls.built_in.values():
            options = handler.resolve_ref_schema(handler(built_in.options.__pydantic_core_schema__))
            for name, described in options.get("properties", {}).items():
                schema.setdefault("properties", {}).setdefault(name, described)
        return reference

    @classmethod
    def option_fields(cls) -> dict[str, FieldInfo]:
        """Return the fields of all built-in techniques' options, by name."""
        options = [built_in.options.model_fields for built_in in cls.built_in.values()]
        return {name: field for fields in reversed(options) for name, field in fields.items()}


def named_sections(section: BaseModel) -> Iterator[tuple[str, NamedSection]]:
    """Yield the named sections below a section, with their dotted keys."""
    for key, value in section:
        for place, inner in _sections_in(key, value):
            if isinstance(inner, NamedSection):
                yield place, inner
            yield from ((f"{place}.{below}", found) for below, found in named_sections(inner))


def _sections_in(key: str, value: Any) -> list[tuple[str, BaseModel]]:
    if isinstance(value, (list, tuple)):
        return [(f"{key}.{place}", item) for place, item in enumerate(value) if isinstance(item, BaseModel)]
    return [(key, value)] if isinstance(value, BaseModel) else []
