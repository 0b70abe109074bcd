"""Points as a source: the rows of an array in a file of NumPy's, or drawn from a mixture of normal distributions."""

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
"""How many points are drawn of a mixture by default: as many as Lin et al. (PacGAN, 2018) train on."""
MAX_POINTS = 10_000_000
_MAX_DIMENSIONS = 1 << 16
_EXPECTED = "expected an array of shape (points, dimensions), float32 or float64"

Point = NDArray[np.floating]


class Mixture(NamedTuple):
    """Equally frequent normal distributions with one standard deviation."""

    centres: NDArray[np.float64]
    """Shape (modes, dimensions)."""
    deviation: float


def ring() -> Mixture:
    """Eight modes at equal angles on the unit circle, sigma 0.01 (Lin et al., PacGAN, 2018, section 4.1)."""
    angles = np.arange(8) * (2 * math.pi / 8)
    return Mixture(np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.01)


def grid() -> Mixture:
    """25 modes on {-4, -2, 0, 2, 4}^2, sigma 0.05 (Lin et al., PacGAN, 2018, section 4.1)."""
    places = np.arange(-4.0, 5.0, 2.0)
    return Mixture(np.stack(np.meshgrid(places, places, indexing="ij"), axis=2).reshape(-1, 2), 0.05)


def draw(name: str, mixture: Mixture, count: int, seed: int) -> Source[Point]:
    """`count` points, each a function of (seed, its number); the number of its mode is its label.

    Raises UserError for fewer than one point, or more than `MAX_POINTS`.
    """
    if not 1 <= count <= MAX_POINTS:
        raise UserError(f"points {count}: expected 1 to {MAX_POINTS}")
    import torch  # takes seconds that no other source needs

    from distgan import randomness

    numbers = torch.arange(count)
    modes = randomness.integers(seed, f"points/{name}/mode", numbers, len(mixture.centres)).numpy()
    noise = randomness.normal(seed, f"points/{name}/noise", numbers, mixture.centres.shape[1:]).numpy()
    return _source(name, mixture.centres[modes] + mixture.deviation * noise, modes)


def open_array(path: Path) -> Source[Point]:
    """The rows of an array of shape (n, d) in NumPy's format.

    Raises:
        UserError: one line naming the file.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses a Python literal, which fails in many ways
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {reason[:200]}; {_EXPECTED}") from None
    if rows.ndim != 2 or rows.dtype.kind != "f" or rows.itemsize not in (4, 8) or 0 in rows.shape:
        raise UserError(f"{path}: an array of {rows.dtype} and shape {rows.shape}; {_EXPECTED}")
    if rows.shape[1] > _MAX_DIMENSIONS:
        raise UserError(f"{path}: points of {rows.shape[1]} numbers; at most {_MAX_DIMENSIONS} are read")
    return _source(path.name, np.asarray(rows), None)


def encode_point(point: Point) -> Encoded:
    """A point as a file in a shard, in float32. Raises InvalidSampleError."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(point, np.float32)
    if not np.isfinite(narrow).all():
        raise InvalidSampleError("holds numbers that are not finite in float32")
    return Encoded(points.encode(narrow), "npy")


def _source(name: str, rows: Point, labels: Labels | None) -> Source[Point]:
    names = LazySequence(len(rows), lambda place: f"{name}[{place}]")
    return Source(names, LazySequence(len(rows), rows.__getitem__), np.asarray, labels, kind="points")
