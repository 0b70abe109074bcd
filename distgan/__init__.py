"""Train GANs across machines, resume them exactly, and compare them by numbers that can be trusted.

>>> import distgan
>>> generator = distgan.load_generator("exported")        # doctest: +SKIP
>>> images = generator(generator.latents(16, seed=0))     # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distgan.version import __version__

if TYPE_CHECKING:
    from distgan.config import Config, load_config
    from distgan.extensions import allow
    from distgan.inference.evaluate import evaluate
    from distgan.inference.export import load_generator
    from distgan.inference.sample import sample
    from distgan.training.loop import train
    from distgan.training.result import Callbacks, RunResult

__all__ = [
    "Callbacks",
    "Config",
    "RunResult",
    "__version__",
    "allow",
    "evaluate",
    "load_config",
    "load_generator",
    "sample",
    "train",
]

_HOMES = {
    "Callbacks": "distgan.training.result",
    "Config": "distgan.config",
    "RunResult": "distgan.training.result",
    "allow": "distgan.extensions",
    "evaluate": "distgan.inference.evaluate",
    "load_config": "distgan.config",
    "load_generator": "distgan.inference.export",
    "sample": "distgan.inference.sample",
    "train": "distgan.training.loop",
}


def __getattr__(name: str) -> Any:
    # Imports of torch take seconds; the command line's --help should not wait for them.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'distgan' has no attribute {name!r}")
