"""Data for any trainer: `distgan.data.Loader`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgan.data.loader import Loader

__all__ = ["Loader"]


def __getattr__(name: str) -> Any:
    # It imports torch, which takes seconds.
    if name in __all__:
        return getattr(importlib.import_module("distgan.data.loader"), name)
    raise AttributeError(f"module 'distgan.data' has no attribute {name!r}")
