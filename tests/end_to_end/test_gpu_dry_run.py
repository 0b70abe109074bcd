"""`tools/gpu.py` from end to end on the CPU, so that no minute on a card is lost to a mistake in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu import PARTS

ROOT = Path(__file__).parents[2]
RECIPES = ("DCGAN-64", "SNGAN-32", "R3GAN-32")


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_reports_and_the_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    before = sorted((ROOT / "docs").rglob("*"))
    done = subprocess.run(
        [sys.executable, "tools/gpu.py", "--dry-run", "--out", str(page), "--minutes", "14"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((ROOT / "docs").rglob("*")) == before
    text = page.read_text()
    assert "Dry run" in text.split("\n## ")[0]
    parts = dict(re.findall(r"^\| (.+?) \| (\w.*?) \| \d+ \|$", section(text, "Parts"), re.MULTILINE))
    assert parts == {part.name: "ok" for part in PARTS if part.name != "R3GAN-code"}
    passed, skipped = map(int, re.findall(r"(\d+) passed, (\d+) skipped", section(text, "tests/gpu"))[0])
    assert passed >= 18
    assert (skipped, "failed: none" in text) == (0, True)
    speeds = section(text, "Recipes")
    for recipe in RECIPES:
        for by in ("distgan", "bare PyTorch"):
            (row,) = re.findall(rf"^\| {recipe} \| {by} \|(.*)\|$", speeds, re.MULTILINE)
            speed, ratio, *_ = row.split("|")
            assert float(speed.replace(",", "")) > 0
            assert float(ratio) > 0
        kernels = section(text, f"Longest kernels: {recipe}")
        assert len(re.findall(r"^\| `", kernels, re.MULTILINE)) == 10
    assert len(re.findall(r"TFLOP/s$", done.stdout, re.MULTILINE)) == 3
    precisions = section(text, "A discriminator update with R1 and R2")
    errors = [float(error) for error in re.findall(r"\| (\S+e[+-]\d+) \|$", precisions, re.MULTILINE)]
    assert len(errors) == 4
    assert errors[0] == 0
    assert all(0 < error < 0.5 for error in errors[2:]), "bf16 moves the gradient, but not far"
    assert "| distgan |" in section(text, "A checkpoint's stall")
    # What comes is printed as it comes, with how each part ended.
    assert done.stdout.index("== machine: ok") < done.stdout.index("== tests (at most")
