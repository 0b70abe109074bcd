"""Record which samples could not be read, and which samples replace them.

A failed read must neither stop a long run nor shift stream positions. Another sample therefore takes its place. The
checkpoint records the replacement. Every rank and every resumed run then uses it, even if the sample becomes readable.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.errors import UserError

logger = logging.getLogger("distgan")

_FEW = 10_000
_MAX_REASON = 500


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read, and its replacement. `reason` is one line: shard, key and cause."""

    sample: int
    replacement: int
    reason: str
    is_lasting: bool = True
    """False if the sample may be readable at another stream position, as stages with random numbers can make it."""


NEVER = 2**62
"""Position from which a failure that is not lasting applies: it is counted and reported, but the sample stays."""


class Substitution(NamedTuple):
    """A `replacement` that applies at all stream positions >= `from_position`."""

    replacement: int
    from_position: int
    reason: str


class Substitutions:
    """The replacements of a run, by sample."""

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
        """Record a failure for all positions >= `from_position`; return True if it is new.

        Returns False without a change if the sample already has a replacement, or would replace itself. All ranks must
        add the same failures in the same order.
        """
        if failure.sample in self._entries or self._leads_to(failure.replacement, failure.sample):
            return False
        self._entries[failure.sample] = Substitution(failure.replacement, from_position, failure.reason[:_MAX_REASON])
        return True

    def apply(self, samples: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples to read at these positions, int64 (n,). A replacement may itself be replaced."""
        if not self._entries:
            return samples
        return np.array(
            [self._resolve(s, p) for s, p in zip(samples.tolist(), positions.tolist(), strict=True)], np.int64
        )

    def reasons(self) -> Iterable[str]:
        """Return the reason of each replacement, in the order of recording."""
        return (entry.reason for entry in self._entries.values())

    def to_json(self) -> list[list[Any]]:
        """Return [[sample, replacement, from_position, reason], ...]."""
        return [[sample, *entry] for sample, entry in self._entries.items()]

    @classmethod
    def from_json(cls, value: Any, dataset_len: int | None = None) -> Substitutions:
        """Parse the output of `to_json`. Raises UserError for other input, or for samples >= `dataset_len`."""
        record = cls()
        for row in value if isinstance(value, list) else [None]:
            if not isinstance(row, list) or [type(item) for item in row] != [int, int, int, str] or min(row[:3]) < 0:
                raise UserError(
                    f"replaced samples: invalid entry: found {str(row)[:80]!r}, "
                    "expected [sample, replacement, from, reason]"
                )
            if dataset_len is not None and max(row[:2]) >= dataset_len:
                raise UserError(
                    f"replaced samples: found sample {max(row[:2])}, expected a number below {dataset_len:,}, "
                    "the number of samples in the data; use the data of this run"
                )
            if not record.add(Failure(row[0], row[1], row[3]), row[2]):
                raise UserError(f"replaced samples: sample {row[0]} is replaced twice, or replaced by itself")
        return record

    def _resolve(self, sample: int, position: int) -> int:
        while (entry := self._entries.get(sample)) is not None and entry.from_position <= position:
            sample = entry.replacement
        return sample

    def _leads_to(self, start: int, sample: int) -> bool:
        while start != sample and start in self._entries:
            start = self._entries[start].replacement
        return start == sample


def record_failures(
    substitutions: Substitutions,
    by_rank: Iterable[Iterable[Failure]],
    position: int,
    dataset_len: int,
    max_failure_rate: float,
    *,
    main: bool,
) -> None:
    """Replace the samples that any rank could not read from `position` on.

    Call on every rank with the failures of all ranks.

    Args:
        main: log a warning for each sample; True on one rank.

    Raises:
        UserError: see `check_failure_rate`.
    """
    for failures in by_rank:
        for failure in failures:
            if substitutions.add(failure, position if failure.is_lasting else NEVER) and main:
                logger.warning("unreadable sample replaced: %s", failure.reason)
    check_failure_rate(substitutions, position, dataset_len, max_failure_rate)


def check_failure_rate(substitutions: Substitutions, position: int, dataset_len: int, max_failure_rate: float) -> None:
    """Raise UserError if the run has replaced too many of the samples read so far. All ranks must know the same.

    The limit is `max_failure_rate` times the number of samples read up to `position`. This number counts as at least
    10,000, so that one early failure does not stop a run, and as at most `dataset_len`. The message names up to five
    samples.
    """
    allowed = max_failure_rate * min(dataset_len, max(position, _FEW))
    if len(substitutions) > allowed:
        shown = "; ".join(reason for reason, _ in zip(substitutions.reasons(), range(5), strict=False))
        raise UserError(
            f"data.max_failure_rate={max_failure_rate:g}: too many unreadable samples: found {len(substitutions)}, "
            f"expected at most {int(allowed)}: {shown}; repair the data or raise the rate",
            everywhere=True,
        )
