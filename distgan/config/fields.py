"""The types that fields of the schema are made of."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    WrapValidator,
    model_validator,
)

from distgan.errors import without_secrets
from distgan.files import cache_folder

_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9]*|(?=\.[0-9]))(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", re.ASCII)
_MAX_DIGITS = 400


def number(value: Any) -> Any:
    """A number from text: decimal, as in YAML 1.2's core schema, whose octal and hexadecimal forms are refused.

    Raises ValueError for text that is anything else: YAML 1.1 has 010 = 8, 1:30 = 90 and 1_000 = 1000.
    """
    if isinstance(value, bool):
        raise ValueError("expected a number, found a boolean")
    if not isinstance(value, str):
        return value
    text = value.strip()
    if len(text) > _MAX_DIGITS or not _DECIMAL.fullmatch(text):
        raise ValueError(f"expected a decimal number, found {value[:80]!r}; write it like 10, 0.5 or 1e-4")
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def plain_value(value: Any) -> Any:
    """Return text of a recipe as the number or boolean that it reads as, also in lists and mappings."""
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if value in ("true", "false"):
        return value == "true"
    is_number = isinstance(value, str) and len(value) <= _MAX_DIGITS and _DECIMAL.fullmatch(value)
    return number(value) if is_number else value


def folder(value: str) -> str:
    """A folder's path with its home expanded. Raises ValueError for one that cannot be."""
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{value[:80]!r} is not the path of a folder; give one such as runs/first")
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise ValueError(f"{value[:80]!r}: there is no such home folder; write the path out")
    return expanded


STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss")
"""Protocols of object stores that a run can write to: those in which an object appears whole."""
_WITH_AT = ("az", "abfs", "abfss", "oci")
"""Those whose URLs may have an `@`: CONTAINER@ACCOUNT or BUCKET@NAMESPACE."""


def run_location(value: str) -> str:
    """A folder's path as of `folder`, or the URL of a folder in an object store without a slash at its end.

    Raises ValueError for a URL of another kind, without a folder below its bucket, with credentials, or with a
    character that some stores or clients do not take literally.
    """
    scheme, separator, rest = value.partition("://")
    if not separator:
        return folder(value)
    name, protocol = rest.strip("/"), scheme.lower()
    parts = name.split("/")
    shown = repr(without_secrets(value)[:200])
    if protocol not in STORES:
        raise ValueError(f"{shown}: expected a folder, or a URL that begins with one of {', '.join(STORES)}")
    if ":" in parts[0] or ("@" in parts[0] and protocol not in _WITH_AT):
        raise ValueError(
            f"{shown}: found a user, password or port beside the bucket; remove it, and set the environment variables "
            "of the store (docs/object-stores.md)"
        )
    if special := sorted(set(name) & set("*?#[]{}")):
        raise ValueError(f"{shown}: found `{special[0]}`, which the URL of a run must not have; rename the folder")
    if len(parts) < 2 or not value.isprintable() or set(parts) & {"", ".", ".."}:
        raise ValueError(f"{shown}: expected a URL of a folder in a bucket, such as s3://bucket/runs/first")
    return f"{protocol}://{name}"


def local_copy(url: str, cache: str | None) -> Path:
    """Return this host's folder of a run in an object store, in a cache folder or the default one.

    Raises UserError if there is no cache folder.
    """
    # With the name of the host, because a cache in a home folder may be that of several nodes.
    name = hashlib.sha256(f"{socket.gethostname()}\n{url}".encode()).hexdigest()[:16]
    return cache_folder(cache) / "runs" / name / url.rpartition("/")[2]


_COLORS = {"white": "#ffffff", "black": "#000000", "gray": "#808080"}


def rgb(value: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a color's name or `#rrggbb`. Raises ValueError."""
    digits = _COLORS.get(value, value)
    if not re.fullmatch("#[0-9a-fA-F]{6}", digits):
        raise ValueError(f"{value[:80]!r} is no color; accepted are {', '.join(_COLORS)} and #rrggbb, such as #ff8000")
    red, green, blue = bytes.fromhex(digits[1:])
    return red, green, blue


def _color(value: str) -> str:
    rgb(value)
    return value


# The bounds keep products of a few of these inside 64 bits and what a stranger's config asks for near what a machine
# has, and are far from what any run needs.
Count = Annotated[int, BeforeValidator(number), Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, BeforeValidator(number), Field(ge=0, le=2**40)]
Size = Annotated[int, BeforeValidator(number), Field(ge=1, le=2**16)]
"""Of a layer."""
Batch = Annotated[int, BeforeValidator(number), Field(ge=1, le=2**17)]
"""Samples at a time."""
Seed = Annotated[int, BeforeValidator(number), Field(ge=0, le=2**63 - 1)]
Real = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]


Color = Annotated[str, AfterValidator(_color)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, documented by attribute docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    takes_effect_with: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {}
    """Key -> another key of the section, and the values of that with which the first one does something."""

    @model_validator(mode="after")
    def _refuse_keys_without_effect(self) -> Self:
        # Compared with defaults, because a resolved config has all keys.
        for key, (other, values) in self.takes_effect_with.items():
            found = getattr(self, other)
            if found not in values and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: has no effect with {other}: {found}, only with {' or '.join(values)}; leave it out, or "
                    f"change {other}"
                )
        return self


class ScheduleConfig(Section):
    """A number that changes with the number of images that the discriminator has been trained on, as papers count them.
    TensorBoard shows its values as `schedule/KEY`."""

    start: Real
    """Value before the first image."""
    end: Real
    """Value that it reaches."""
    over: Annotated[Positive, Field(le=1e12)] | None = None
    """Duration of the change from `start` to `end`, in thousands of images; null: the whole run."""
    shape: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the change: `linear`, half a `cosine`, or `constant`, which stays at `start` until a jump to `end`."""
    after: Literal["hold"] = "hold"
    """Behavior afterward. Always `hold`: the value stays at `end`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start == self.end:
            raise ValueError(
                f"start: equals end, so that nothing changes; write {self.start:g} in place of the schedule"
            )
        return self


def plain_or_section(plain: Any, section: type[Section]) -> WrapValidator:
    """Return a validator of a union of a plain type and a section.

    It replaces the union's own check, which reports a mistake once for each member.
    """
    plains = TypeAdapter(plain)

    def check(value: Any, _: Any) -> Any:
        is_section = isinstance(value, (Mapping, Section))
        return section.model_validate(value) if is_section else plains.validate_python(value)

    return WrapValidator(check)


def ends_within(number: Any) -> AfterValidator:
    """Return a validator of a number or of a schedule whose ends are within the bounds of a type of number."""
    ends = TypeAdapter(number)

    def check(value: Any) -> Any:
        for end in (value.start, value.end) if isinstance(value, ScheduleConfig) else ():
            ends.validate_python(end)
        return value

    return AfterValidator(check)


Decay = Annotated[Real, Field(ge=0, lt=1)]
ScheduledPositive = Annotated[
    Positive | ScheduleConfig, plain_or_section(Positive, ScheduleConfig), ends_within(NotNegative)
]
ScheduledNotNegative = Annotated[
    NotNegative | ScheduleConfig, plain_or_section(NotNegative, ScheduleConfig), ends_within(NotNegative)
]
ScheduledReal = Annotated[Real | ScheduleConfig, plain_or_section(Real, ScheduleConfig)]
ScheduledFraction = Annotated[
    Fraction | ScheduleConfig, plain_or_section(Fraction, ScheduleConfig), ends_within(Fraction)
]
ScheduledDecay = Annotated[Decay | ScheduleConfig, plain_or_section(Decay, ScheduleConfig), ends_within(Decay)]
