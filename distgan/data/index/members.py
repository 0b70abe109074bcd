"""Which members of a tar are samples, and what is said of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distgan.data.index.table import EXTENSIONS, KINDS, OTHER
from distgan.errors import UserError, counted, printable

LatentMembers = Literal["moments", "latent"]
"""What `.npy` members hold that are no points."""
_SORTS_SHOWN = 6
Passed = dict[str, tuple[int, bytes]]
"""Skipped members: their number and one example name, per sort."""


@dataclass(frozen=True)
class SampleRule:
    """Which members are samples."""

    stored: Mapping[str, str]
    """Entry of `EXTENSIONS` for each extension of a sample's data."""
    last_dot: bool

    @classmethod
    def of(
        cls, extension: str | None, last_dot: bool, latents: LatentMembers | None = None, kind: str | None = None
    ) -> SampleRule:
        """Return the rule of `index_shards`. Raises UserError for an extension that no sample can have."""
        if kind is not None:
            return cls({known: known for known in KINDS[kind]}, last_dot)
        if extension is None and latents is not None:
            extension = "npy"
        if extension is None:
            return cls({known: known for known in EXTENSIONS if known != OTHER}, last_dot)
        names = [name.strip().removeprefix(".").lower() for name in extension.split(";")]
        if not all(names) or "cls" in names or not extension.isascii():
            raise UserError(
                f"--extension {printable(extension)[:100]!r}: expected the extension of a file in the shards, such as "
                "tif or 'tif;tiff'; class labels are .cls"
            )
        return cls(dict.fromkeys(names, f"{latents}.npy" if latents else OTHER), last_dot)

    def split(self, name: bytes) -> tuple[bytes, str]:
        """Split a member's name into key and extension; see `split_name`."""
        return split_name(name, self.last_dot)


def split_name(name: bytes, last_dot: bool = False) -> tuple[bytes, str]:
    """Split a member's name into its WebDataset key and extension.

    Splits at the first dot of the last path component, or at its last dot with `last_dot`. Returns two empty strings
    for hidden files and for names without a dot.
    """
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.rpartition(b".") if last_dot else base.partition(b".")
    if not stem or not dot or base.startswith(b".") or (name.startswith(b"__") and name.endswith(b"__")):
        return b"", ""
    return folder + slash + stem, extension.lower().decode("ascii", "replace")


def sort_of(name: bytes, extension: str) -> str:
    """Return the sort of a member that is no sample, for messages."""
    if extension:
        return f".{printable(extension)[:20]}"
    hidden = name.rpartition(b"/")[2].startswith(b".")
    return "hidden members" if hidden else "members without an extension"


def describe_passed(passed: Passed, rule: SampleRule) -> tuple[str, ...]:
    """Return a line that counts skipped members, and a hint if --last-dot would make some of them samples."""
    if not passed:
        return ()
    common = sorted(passed.items(), key=lambda item: -item[1][0])
    listed = [f"{count:,} {what} (such as {shown(example)!r})" for what, (count, example) in common[:_SORTS_SHOWN]]
    more = f", and {len(common) - _SORTS_SHOWN} other sorts" if len(common) > _SORTS_SHOWN else ""
    total = sum(count for count, _ in passed.values())
    lines = [f"skipped {counted(total, 'member')}: {', '.join(listed)}{more}"]
    alone = [(what, example) for what, (_, example) in common if not what.endswith(" beside samples")]
    dotted = [example for what, example in alone if what.startswith(".") and is_sample_by_last_dot(example, rule)]
    if dotted and not rule.last_dot:
        lines.append(
            f"{shown(dotted[0])!r} was skipped because WebDataset extensions begin at the first dot of a name; "
            "add --last-dot to begin them at the last dot"
        )
    return tuple(lines)


def is_sample_by_last_dot(name: bytes, rule: SampleRule) -> bool:
    """Return True if a member would be a sample with --last-dot only."""
    return split_name(name, True)[1] in rule.stored and split_name(name)[1] not in rule.stored


def shown(name: bytes) -> str:
    """Return a member's name or key for messages."""
    return name.decode("utf-8", "replace")[:200]
