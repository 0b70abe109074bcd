"""Stacked digits: RGB images whose channels are three random digits, such as StackedMNIST.

Metz, Poole, Pfau, Sohl-Dickstein, "Unrolled Generative Adversarial Networks", ICLR 2017; Lin, Khetan, Fanti, Oh,
"PacGAN", NeurIPS 2018, section 4.2: 128,000 images of three digits drawn independently from MNIST, in 1,000 classes.
"""

from __future__ import annotations

import numpy as np

from distgan.data.packing.sources.source import LazySequence, Pixels, Source
from distgan.errors import UserError

MAX_IMAGES = 10_000_000
CLASSES = 1000


def stack(source: Source[Pixels], name: str, count: int, seed: int) -> Source[Pixels]:
    """Draw `count` images of three digits each. Image i is a function of the seed and i.

    Digits a, b and c are the channels R, G and B. The label is 100 a + 10 b + c.

    Args:
        source: gray digits with labels from 0 to 9.
        name: the source as typed, for messages.

    Raises:
        UserError: `count` is not from 1 to `MAX_IMAGES`, or the source is another one.
    """
    if not 1 <= count <= MAX_IMAGES:
        raise UserError(f"stack {count}: expected 1 to {MAX_IMAGES} images")
    digits, labels, found = source.slots, source.labels, None
    if source.kind != "images" or not isinstance(digits[0], np.ndarray):
        found = "image files" if source.kind == "images" else source.kind
    elif labels is None:
        found = "no labels"
    elif labels.max() > 9:
        found = f"label {labels.max()}"
    if found or labels is None:
        raise UserError(
            f"{name}: stack needs gray digits with labels from 0 to 9, found {found}; name MNIST's images file, such "
            "as train-images-idx3-ubyte.gz, with its labels file beside it, or builtin:digits"
        )
    import torch  # the import takes seconds, and other sources do not need it

    from distgan import randomness

    drawn = randomness.integers(seed, "stacked/digits", torch.arange(count), len(digits), (3,)).numpy()
    return Source(
        names=LazySequence(count, lambda place: " + ".join(source.names[i] for i in drawn[place])),
        slots=LazySequence(count, lambda place: np.stack([digits[i] for i in drawn[place]], axis=2)),
        read=source.read,
        labels=labels[drawn] @ np.array([100, 10, 1]),
        class_names=tuple(f"{number:03d}" for number in range(CLASSES)),
        notes=source.notes,
    )
