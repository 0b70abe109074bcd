"""Moments of the latents in some shards, from which the shift and scale of each channel follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from distgan.data.kinds import latents
from distgan.data.kinds.latents import ArrayKind, StoredLatents
from distgan.errors import UserError


@dataclass
class LatentStatistics:
    """What the members of some shards hold, and sums over what is drawn from them."""

    members: dict[ArrayKind, int] = field(default_factory=dict)
    """Number of members."""
    sums: dict[ArrayKind, NDArray[np.float64]] = field(default_factory=dict)
    """Sums and sums of squares per channel, (2, channels)."""

    def add(self, data: bytes | memoryview, extension: str) -> None:
        """Add a member. Raises UnreadableSampleError."""
        kind, values = latents.read(data, extension)
        wide = values.astype(np.float64).reshape(-1, values.shape[-3], kind.resolution**2)
        mean, squares = wide[:, : kind.channels], wide[:, : kind.channels] ** 2
        if kind.moments:  # of a draw: squared mean and variance
            squares = squares + np.exp(wide[:, kind.channels :].clip(*latents.LOG_VARIANCES))
        self._add(kind, 1, np.stack([mean.sum((0, 2)), squares.sum((0, 2))]))

    def _add(self, kind: ArrayKind, members: int, sums: NDArray[np.float64]) -> None:
        self.members[kind] = self.members.get(kind, 0) + members
        self.sums[kind] = self.sums.get(kind, 0.0) + sums

    def stored(self, shift: Sequence[float] | None, scale: Sequence[float] | None) -> tuple[StoredLatents, int]:
        """Return what most members hold, and the number of readable members that hold something else.

        Args:
            shift: one number, or one per channel; None is the mean of the channel.
            scale: as `shift`; None is 1 over the standard deviation of the channel.

        Raises:
            UserError: no member is readable, a channel is constant, or the numbers are too many or too few.
        """
        if not self.members:
            raise UserError("latents: found no readable member; encode the images again")
        kind = max(self.members, key=lambda kind: (self.members[kind], kind))
        count = self.members[kind] * kind.resolution**2 * (2 if kind.flipped else 1)
        mean, square = self.sums[kind] / count
        deviation = np.sqrt((square - mean**2).clip(0.0))
        if scale is None and not (deviation > 0).all():
            raise UserError(
                f"latents: channel {int(deviation.argmin())} has the same value everywhere, so that its scale cannot "
                "be measured; set --scale"
            )
        stored = StoredLatents(
            shift=tuple(mean.tolist()) if shift is None else _one_each("--shift", shift, kind.channels),
            scale=tuple((1 / deviation).tolist()) if scale is None else _one_each("--scale", scale, kind.channels),
            **kind._asdict(),
        )
        return stored, sum(self.members.values()) - self.members[kind]


def sum_statistics(parts: Iterable[LatentStatistics]) -> LatentStatistics:
    """Return the statistics of all shards from those of each, added in their order."""
    total = LatentStatistics()
    for part in parts:
        for kind, sums in part.sums.items():
            total._add(kind, part.members[kind], sums)
    return total


def _one_each(option: str, given: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(given) not in (1, channels):
        raise UserError(f"{option}: found {len(given)} numbers, expected 1, or 1 for each of {channels} channels")
    if not np.isfinite(given).all() or (option == "--scale" and min(given) <= 0):
        raise UserError(f"{option} {' '.join(map(str, given))}: expected finite numbers, and scales above 0")
    return tuple(map(float, given)) * (channels if len(given) == 1 else 1)
