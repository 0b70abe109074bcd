"""The table of modes that each objective covers, on a budget of ten updates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import rows
from tools.experiments import mode_coverage

RUNS = {"non-saturating": "non-saturating", "WGAN-GP, lambda 0.1": "wgan-gp-lambda-0-1"}
"""The objectives of the table here, and what the folders of their runs are called."""


def cells(table: str, name: str) -> list[str]:
    """The row of an objective in a table."""
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.split("|")[2:-1]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_coverage_is_measured_once_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode_coverage, "OBJECTIVES", {name: mode_coverage.OBJECTIVES[name] for name in RUNS})
    monkeypatch.setattr(mode_coverage, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(mode_coverage, "MIXTURES", {"ring": mode_coverage.MIXTURES["ring"]})
    monkeypatch.setattr(mode_coverage, "SEEDS", (3,))
    monkeypatch.setattr(mode_coverage, "UPDATES", 10)
    mode_coverage.main(tmp_path / "docs")
    folder = tmp_path / "runs" / "ring"
    assert {path.name for path in folder.iterdir()} == {f"{name}-3" for name in RUNS.values()}
    # Ten discriminator updates, of which WGAN-GP's critic takes five in a step.
    for name, steps in (("non-saturating", 10), ("WGAN-GP, lambda 0.1", 2)):
        assert [row["step"] for row in rows(folder / f"{RUNS[name]}-3") if "modes" in row] == [0, steps]
    with Image.open(tmp_path / "docs" / "mode-coverage-ring.png") as image:
        inked = (np.asarray(image) == (0x44, 0x77, 0xAA)).all(2)
    for panel in (inked[:, :220], inked[:, 220:440]):
        assert panel.any()
    assert not inked[:, 440:].any()

    # What is finished is read, not done again; the values are the runs' own at the last step, and a cell is their mean.
    monkeypatch.setattr(mode_coverage, "SEEDS", (3, 4))
    told = {"non-saturating": [(7, 0.5), (8, 0.25)], "WGAN-GP, lambda 0.1": [(0, 0.0), (1, 0.001)]}
    written = {}
    for name, values in told.items():
        shutil.copytree(folder / f"{RUNS[name]}-3", folder / f"{RUNS[name]}-4")
        for seed, (modes, share) in zip((3, 4), values, strict=True):
            metrics = folder / f"{RUNS[name]}-{seed}" / "metrics.jsonl"
            *earlier, last = rows(metrics.parent)
            changed = [*earlier, {**last, "modes": modes, "modes_high_quality": share}]
            written[metrics] = "".join(json.dumps(row) + "\n" for row in changed)
            metrics.write_text(written[metrics])
    mode_coverage.main(tmp_path / "docs")
    table = (tmp_path / "docs" / "mode-coverage.md").read_text()
    assert cells(table, "objective") == ["ring: modes of 8", "ring: share of high quality"]
    assert cells(table, "non-saturating") == ["7.5", "37.5%"]
    assert cells(table, "WGAN-GP, lambda 0.1") == ["0.5", "0.1%"]
    assert {metrics: metrics.read_text() for metrics in written} == written
