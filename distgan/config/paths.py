"""Where a node keeps what it would otherwise fetch or compute again."""

from __future__ import annotations

import os
from pathlib import Path

from distgan.errors import UserError


def cache_folder(configured: str | None) -> Path:
    """The node-local cache: as configured, else ``$DISTGAN_CACHE``, else ``~/.cache/distgan``.

    Raises:
        UserError: it lies in a home folder, and this user has none.
    """
    try:
        return Path(configured or os.environ.get("DISTGAN_CACHE") or Path.home() / ".cache" / "distgan").expanduser()
    except RuntimeError:
        raise UserError(
            "the cache folder lies in a home folder, and this user has none; set DISTGAN_CACHE to a writable folder"
        ) from None
