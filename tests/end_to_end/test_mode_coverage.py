"""The table of modes that each objective covers, on a budget of ten updates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.experiments import mode_coverage


@pytest.mark.slow
def test_coverage_is_measured_once_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("non-saturating", "WGAN-GP, lambda 0.1")
    monkeypatch.setattr(mode_coverage, "OBJECTIVES", {name: mode_coverage.OBJECTIVES[name] for name in names})
    monkeypatch.setattr(mode_coverage, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(mode_coverage, "MIXTURES", {"ring": mode_coverage.MIXTURES["ring"]})
    monkeypatch.setattr(mode_coverage, "SEEDS", (3,))
    monkeypatch.setattr(mode_coverage, "UPDATES", 10)
    mode_coverage.main(tmp_path / "docs")
    table = (tmp_path / "docs" / "mode-coverage.md").read_text()
    for name in names:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        modes, share = (cell.strip() for cell in row.split("|")[2:-1])
        assert 0 <= float(modes) <= 8
        assert 0 <= float(share.removesuffix("%")) < 20
    assert (tmp_path / "docs" / "mode-coverage-ring.png").exists()
    rows = sorted(tmp_path.rglob("metrics.jsonl"))
    assert len(rows) == 2
    before = [path.stat().st_mtime_ns for path in rows]
    mode_coverage.main(tmp_path / "docs")
    assert [path.stat().st_mtime_ns for path in rows] == before
