"""Images that come with an installed package, so that a first run needs no download."""

from __future__ import annotations

import numpy as np

from distgan.data.layout import Pixels, Source, pixel_source
from distgan.errors import UserError

PREFIX = "builtin:"


def open_builtin(name: str) -> Source[Pixels]:
    """The source that ``builtin:NAME`` names. Raises UserError with the valid names."""
    if name != "digits":
        raise UserError(f"{PREFIX}{name}: unknown; the built-in source is {PREFIX}digits")
    return open_digits()


def open_digits() -> Source[Pixels]:
    """scikit-learn's bundled digits: 1,797 scans of 8x8 pixels with 17 grey levels, as uint8 from 0 to 255.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits  # a second of imports that no other source needs

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digits[{number}]" for number in range(len(images))]
    labels = digits.target.astype(np.int64)
    return pixel_source(names, images, labels, tuple(str(digit) for digit in range(10)))
