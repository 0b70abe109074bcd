"""Built-in sources: samples from installed packages or random draws, so that a first run needs no download."""

from __future__ import annotations

from typing import Any

import numpy as np

from distgan.data.packing.sources import arrays
from distgan.data.packing.sources.lines import text_source
from distgan.data.packing.sources.prose import python_prose
from distgan.data.packing.sources.source import Pixels, Source, pixel_source
from distgan.errors import UserError
from distgan.packages import missing_package

PREFIX = "builtin:"
BUILTIN = ("digits", "text", "ring", "grid")
_MIXTURES = {"ring": arrays.ring, "grid": arrays.grid}
MIXTURES = tuple(PREFIX + name for name in _MIXTURES)


def open_builtin(name: str, points: int | None, seed: int) -> Source[Any]:
    """Open the source ``builtin:NAME``. `points` and `seed` apply to mixtures. Raises UserError for unknown names."""
    if name == "digits":
        return open_digits()
    if name == "text":
        return text_source(name, python_prose())
    if name in _MIXTURES:
        return arrays.draw(name, _MIXTURES[name](), arrays.POINTS if points is None else points, seed)
    if name == "stacked-mnist":
        raise UserError(
            f"{PREFIX}{name}: not built in, because distgan has no MNIST images; pass their idx file and --stack, as "
            "in distgan pack t10k-images-idx3-ubyte.gz DEST --stack"
        )
    raise UserError(
        f"{PREFIX}{name}: unknown built-in source; use one of {', '.join(PREFIX + known for known in BUILTIN)}"
    )


def open_digits() -> Source[Pixels]:
    """Open scikit-learn's bundled digits: 1,797 scans of 8x8 pixels with 17 gray levels, as uint8 from 0 to 255.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits  # the import takes a second, and other sources do not need it
    except ImportError:
        raise missing_package(f"{PREFIX}digits", "scikit-learn", "pack images of your own") from None

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digits[{number}]" for number in range(len(images))]
    labels = digits.target.astype(np.int64)
    return pixel_source(names, images, labels, tuple(str(digit) for digit in range(10)))
