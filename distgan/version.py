"""Package version, and a digest of the package's source code."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from distgan.code_description import source_files

__version__ = "0.1.0"


@cache
def code_digest() -> str:
    """Return the SHA-256 of the names and contents of this package's Python files, as 64 hexadecimal digits.

    Ranks compare it before training, because their code must be the same.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(source_files(root)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
