"""`make results`, on a budget of two steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import results


@pytest.mark.slow
def test_results_are_measured_once_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "OUT", tmp_path / "docs")
    small = ["--set", "evaluation.num_samples=100", "--set", "monitoring.every=1"]
    names = ["digits-dcgan", "text-wgan-gp-small"]
    monkeypatch.setattr(sys, "argv", ["results.py", *names, "--steps", "2", *small])
    results.main()
    written = (tmp_path / "docs" / "README.md").read_text()
    measured = [(tmp_path / "runs" / name / "result.json").stat().st_mtime_ns for name in names]
    for name in names:
        (row,) = [line for line in written.splitlines() if line.startswith(f"| [{name}]")]
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        assert cells[-2:] == ["2", {"digits-dcgan": "1,500", "text-wgan-gp-small": "1,500"}[name]]
        assert bool(cells[0]) == (name == "digits-dcgan")
        assert bool(cells[4]) == (name == "text-wgan-gp-small")
        assert (tmp_path / "docs" / f"{name}.png").exists()
    assert (tmp_path / "docs" / "gallery.png").exists()
    results.main()
    assert (tmp_path / "docs" / "README.md").read_text() == written
    assert [(tmp_path / "runs" / name / "result.json").stat().st_mtime_ns for name in names] == measured
