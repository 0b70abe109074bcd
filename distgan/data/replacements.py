"""Samples that cannot be read, and the samples that stand in for them.

A failed read must neither stop a run of days nor shift a position. So the data of another sample take its place; which
one is recorded in the checkpoint, and from then on every rank and every resumed process uses the replacement, even
where a read would now succeed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.errors import UserError

_FEW = 10_000
_MAX_REASON = 500


@dataclass(frozen=True)
class Failure:
    """A sample could not be read and another was, in its place. `reason` is one line: shard, key and cause."""

    sample: int
    replacement: int
    reason: str


class Substitution(NamedTuple):
    """`replacement` stands in at all positions >= `from_position`."""

    replacement: int
    from_position: int
    reason: str


class Substitutions:
    """The record of a run: sample -> what replaces it, from which position on."""

    def __init__(self, entries: dict[int, Substitution] | None = None) -> None:
        self._entries = dict(entries or {})

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample: object) -> bool:
        return sample in self._entries

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Substitutions) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def add(self, failure: Failure, from_position: int) -> bool:
        """Record a failure for all positions from `from_position` on. False, and no change, if the sample has one.

        All ranks must add the same failures in the same order.
        """
        if failure.sample in self._entries or self._leads_to(failure.replacement, failure.sample):
            return False
        self._entries[failure.sample] = Substitution(failure.replacement, from_position, failure.reason[:_MAX_REASON])
        return True

    def apply(self, samples: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples whose data belong at the given positions; a replacement may itself be replaced."""
        if not self._entries:
            return samples
        return np.array(
            [self._resolve(s, p) for s, p in zip(samples.tolist(), positions.tolist(), strict=True)], np.int64
        )

    def reasons(self) -> Iterable[str]:
        """Why each sample was replaced, in the order found."""
        return (entry.reason for entry in self._entries.values())

    def to_json(self) -> list[list[Any]]:
        """[[sample, replacement, from_position, reason], ...]"""
        return [[sample, *entry] for sample, entry in self._entries.items()]

    @classmethod
    def from_json(cls, value: Any, dataset_len: int | None = None) -> Substitutions:
        """What `to_json` gave. Raises UserError for anything else, or samples not below `dataset_len`."""
        record = cls()
        for row in value if isinstance(value, list) else [None]:
            if not isinstance(row, list) or [type(item) for item in row] != [int, int, int, str] or min(row[:3]) < 0:
                raise UserError(f"replaced samples: {str(row)[:80]!r} is not [sample, replacement, from, reason]")
            if dataset_len is not None and max(row[:2]) >= dataset_len:
                raise UserError(
                    f"replaced samples: {max(row[:2])} is not one of the {dataset_len:,} samples of the data"
                )
            if not record.add(Failure(row[0], row[1], row[3]), row[2]):
                raise UserError(f"replaced samples: sample {row[0]} is replaced twice, or by itself in the end")
        return record

    def _resolve(self, sample: int, position: int) -> int:
        while (entry := self._entries.get(sample)) is not None and entry.from_position <= position:
            sample = entry.replacement
        return sample

    def _leads_to(self, start: int, sample: int) -> bool:
        while start != sample and start in self._entries:
            start = self._entries[start].replacement
        return start == sample


def check_failure_rate(substitutions: Substitutions, position: int, dataset_len: int, max_failure_rate: float) -> None:
    """Raise UserError, naming some, when too many of the samples read so far could not be read.

    Of the samples seen up to stream position `position` (at least 10,000, so that one early failure stops no run; at
    most all of them), no more than `max_failure_rate` may have been replaced.
    """
    allowed = max_failure_rate * min(dataset_len, max(position, _FEW))
    if len(substitutions) > allowed:
        shown = "; ".join(reason for reason, _ in zip(substitutions.reasons(), range(5), strict=False))
        raise UserError(
            f"{len(substitutions)} samples could not be read, more than data.max_failure_rate={max_failure_rate:g} "
            f"allows: {shown}; mend the data or raise the rate"
        )
