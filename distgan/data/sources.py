"""Where images to be packed come from: a folder, a zip archive, an idx pair, or a built-in set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distgan.data.builtin import PREFIX, open_builtin
from distgan.data.folders import open_folder
from distgan.data.idx import is_idx, open_idx
from distgan.data.layout import Source
from distgan.data.zips import open_zip
from distgan.errors import UserError

_ACCEPTED = "accepted: a folder of images, a zip of one, an idx images file (MNIST's format), or builtin:digits"


def open_source(source: str | os.PathLike[str]) -> Source[Any]:
    """The images that `source` names. Files are told apart by their first bytes, not by their names.

    Raises:
        UserError: one line naming the source, what was found and what is accepted.
    """
    text = os.fspath(source)
    if text.startswith(PREFIX):
        return open_builtin(text.removeprefix(PREFIX))
    path = Path(text)
    if path.is_dir():
        return open_folder(path)
    if "://" in text:
        raise UserError(f"{text}: a URL; copy the images to a local disk first. {_ACCEPTED}")
    if path.exists() and not path.is_file():  # opening a FIFO would wait for its writer
        raise UserError(f"{text}: neither a file nor a folder; {_ACCEPTED}")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except (OSError, ValueError) as error:
        raise UserError(f"{text}: {getattr(error, 'strerror', None) or error}; {_ACCEPTED}") from None
    if head.startswith(b"PK") or path.suffix.lower() == ".zip":
        return open_zip(path)
    if is_idx(head):
        return open_idx(path)
    if path.suffix.lower() == ".tar":
        raise UserError(f"{text}: a tar; tars need no packing: run `distgan index` on its folder")
    raise UserError(f"{text}: not a source of images; {_ACCEPTED}")
