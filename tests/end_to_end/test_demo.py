"""`make demo` as a newcomer runs it: a clean copy, readable digits, a FID that has clearly fallen."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "distgan")], check=True)
    # The install is the registry's business; this environment has it already.
    (tmp_path / "distgan" / ".venv").symlink_to(ROOT / ".venv")
    started = time.monotonic()
    first = subprocess.run(["make", "demo"], cwd=tmp_path / "distgan", capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert time.monotonic() - started < 240
    found = re.search(r"FID .*: ([\d.]+) at step 0, ([\d.]+) at step", first.stdout)
    assert found is not None, first.stdout
    before, after = map(float, found.groups())
    assert after < 0.2 * before
    assert (tmp_path / "distgan" / "runs" / "digits-dcgan" / "digits.png").exists()
    started = time.monotonic()
    again = subprocess.run(["make", "demo"], cwd=tmp_path / "distgan", capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 60
    assert found[0] in again.stdout
