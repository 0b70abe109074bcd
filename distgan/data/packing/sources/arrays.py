"""Sources of points: the rows of an .npy array, or draws from a mixture of normal distributions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.data.kinds import points
from distgan.data.packing.sources.source import Encoded, InvalidSampleError, Labels, LazySequence, Source
from distgan.errors import UserError

POINTS = 100_000
"""Default number of points drawn from a mixture, as in Lin et al. (PacGAN, 2018)."""
MAX_POINTS = 10_000_000
_MAX_DIMENSIONS = 1 << 16
_EXPECTED = "expected an array of shape (points, dimensions), float32 or float64"

Point = NDArray[np.floating]


class Mixture(NamedTuple):
    """Normal distributions with equal weights and one standard deviation."""

    centers: NDArray[np.float64]
    """Shape (modes, dimensions)."""
    deviation: float


def ring() -> Mixture:
    """Return eight modes at equal angles on the unit circle, sigma 0.01 (Lin et al., PacGAN, 2018, section 4.1)."""
    angles = np.arange(8) * (2 * math.pi / 8)
    return Mixture(np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.01)


def grid() -> Mixture:
    """Return 25 modes on {-4, -2, 0, 2, 4}^2, sigma 0.05 (Lin et al., PacGAN, 2018, section 4.1)."""
    places = np.arange(-4.0, 5.0, 2.0)
    return Mixture(np.stack(np.meshgrid(places, places, indexing="ij"), axis=2).reshape(-1, 2), 0.05)


def draw(name: str, mixture: Mixture, count: int, seed: int) -> Source[Point]:
    """Draw `count` points, labeled by mode. Each point is a function of the seed and its index.

    Raises UserError unless `count` is from 1 to `MAX_POINTS`.
    """
    if not 1 <= count <= MAX_POINTS:
        raise UserError(f"points {count}: expected 1 to {MAX_POINTS}")
    import torch  # the import takes seconds, and other sources do not need it

    from distgan import randomness

    numbers = torch.arange(count)
    modes = randomness.integers(seed, f"points/{name}/mode", numbers, len(mixture.centers)).numpy()
    noise = randomness.normal(seed, f"points/{name}/noise", numbers, mixture.centers.shape[1:]).numpy()
    return _source(name, mixture.centers[modes] + mixture.deviation * noise, modes)


def open_array(path: Path) -> Source[Point]:
    """Open the rows of an array of shape (n, d) in NumPy's format as points.

    Raises:
        UserError: the file is not such an array; the message names the file.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses a Python literal, which raises many exceptions
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot read the array: {reason[:200]}; {_EXPECTED}") from None
    if rows.ndim != 2 or rows.dtype.kind != "f" or rows.itemsize not in (4, 8) or 0 in rows.shape:
        raise UserError(f"{path}: wrong array: found {rows.dtype} of shape {rows.shape}, {_EXPECTED}")
    if rows.shape[1] > _MAX_DIMENSIONS:
        raise UserError(f"{path}: too many dimensions: found {rows.shape[1]}, expected at most {_MAX_DIMENSIONS}")
    return _source(path.name, np.asarray(rows), None)


def encode_point(point: Point) -> Encoded:
    """Encode a point as a file in a shard, in float32. Raises InvalidSampleError if it is not finite."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(point, np.float32)
    if not np.isfinite(narrow).all():
        raise InvalidSampleError("holds numbers that are not finite in float32")
    return Encoded(points.encode(narrow), "npy")


def _source(name: str, rows: Point, labels: Labels | None) -> Source[Point]:
    names = LazySequence(len(rows), lambda place: f"{name}[{place}]")
    return Source(names, LazySequence(len(rows), rows.__getitem__), np.asarray, labels, kind="points")
