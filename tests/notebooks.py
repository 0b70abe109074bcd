"""Code of a notebook, without Jupyter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

_KERNEL = """
import json, linecache, sys
for number, cell in enumerate(json.loads(sys.argv.pop())):
    name = f"<cell {number}>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
    exec(compile(cell, name, "exec"))
"""


def cells(*sources: str, arguments: Sequence[str] = ()) -> list[str]:
    """Run cells one after another in a module `__main__` without a file; return the lines that they print.

    As IPython does, it keeps their sources where tracebacks look for them.
    """
    found = subprocess.run(
        [sys.executable, "-c", _KERNEL, *arguments, json.dumps(sources)], check=False, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()
