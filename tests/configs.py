"""The least recipe of a run, as values and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MINIMAL: dict[str, Any] = {
    "run_dir": "r",
    "data": {"path": "d", "resolution": 32},
    "training": {"steps": 5, "batch_size": 8},
}


VALID = "run_dir: r\ndata: {path: d, resolution: 32}\ntraining: {steps: 5, batch_size: 8}"
"""The same as a file."""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path
