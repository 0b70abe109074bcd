"""Folders: the cache of a node, and how a run folder is told from others."""

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


def is_run_folder(folder: Path) -> bool:
    """Return True if a run has written to the folder. A config.yaml alone can be a recipe of the user."""
    return any((folder / name).exists() for name in ("status.json", "checkpoints"))
