"""Open sources of samples to pack: images, lines of text and points, in files or built in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distgan.data.packing.sources.arrays import open_array
from distgan.data.packing.sources.builtin import BUILTIN, MIXTURES, PREFIX, open_builtin
from distgan.data.packing.sources.folder import open_folder
from distgan.data.packing.sources.idx import is_idx, open_idx
from distgan.data.packing.sources.lines import open_lines
from distgan.data.packing.sources.source import Source, is_image
from distgan.data.packing.sources.stacked import stack as stack_digits
from distgan.data.packing.sources.zip_archive import open_zip
from distgan.errors import UserError

_ACCEPTED = (
    "expected a folder or zip of images, an idx images file (MNIST's format), a .txt file of lines, an .npy "
    f"file of points, or {', '.join(PREFIX + name for name in BUILTIN)}"
)


def open_source(
    source: str | os.PathLike[str],
    *,
    points: int | None = None,
    stack: int | None = None,
    seed: int = 0,
    follow_links: bool = False,
) -> Source[Any]:
    """Open the samples that `source` names. The first bytes identify a file's format; a .txt suffix identifies text.

    Args:
        points: number of points to draw from a built-in mixture; None draws `arrays.POINTS`. Other sources need None.
        stack: number of images of three digits to draw from gray digits; None opens the source as it is.
        seed: random seed of these draws.
        follow_links: in a folder, follow links to folders and to targets outside the folder.

    Raises:
        UserError: `source` is not a valid source. The message names what was found and what is expected.
    """
    text = os.fspath(source)
    if stack is not None:
        return stack_digits(open_source(text, points=points, seed=seed), text, stack, seed)
    if points is not None and text not in MIXTURES:
        raise UserError(f"points {points}: this option needs {' or '.join(MIXTURES)}, found {text}; remove it")
    if text.startswith(PREFIX):
        return open_builtin(text.removeprefix(PREFIX), points, seed)
    path = Path(text)
    if path.is_dir():
        return open_folder(path, follow_links=follow_links)
    if "://" in text:
        raise UserError(f"{text}: found a URL, {_ACCEPTED}; copy it to a local disk first")
    if path.exists() and not path.is_file():  # opening a FIFO would block
        raise UserError(f"{text}: neither a file nor a folder; {_ACCEPTED}")
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except (OSError, ValueError) as error:
        raise UserError(f"{text}: {getattr(error, 'strerror', None) or error}; {_ACCEPTED}") from None
    if path.suffix.lower() == ".txt":
        return open_lines(path)
    if text.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".tar.bz2")):
        first = "" if text.lower().endswith(".tar") else "decompress it and "
        raise UserError(f"{text}: found a tar, which needs no packing; {first}run `distgan index` on its folder")
    if is_image(text):
        raise UserError(f"{text}: found one image, expected a folder; run `distgan pack {path.parent} DEST`")
    if head.startswith(b"PK") or path.suffix.lower() == ".zip":
        return open_zip(path)
    if head == b"\x93NUMPY":
        return open_array(path)
    if is_idx(head):
        return open_idx(path)
    raise UserError(f"{text}: not a source of samples; {_ACCEPTED}")
