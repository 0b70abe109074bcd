"""Charts that TensorBoard groups the scalars in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.plugins.custom_scalar import layout_pb2

from distgan.monitoring.layout import custom_layout
from tests.unit.test_tracker import events, log, open_main

WITHOUT_CHART = {"progress/kimg", "growth/resolution", "ranks/slowest"}
DOCUMENTED = re.findall(r"`(\w+/\w+)`", (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text())
VALUES = {
    "fid[classifier]", "inception_score[inception]", "kid[inception]", "classes[classifier]", "modes", "ngram_js[1]",
}  # fmt: skip
every_scalar = pytest.mark.parametrize("name", sorted({*DOCUMENTED, *VALUES}))


def layout(run_dir: Path) -> dict[str, list[str]]:
    """The layout that TensorBoard shows: groups with the titles of their charts."""
    found = layout_pb2.Layout.FromString(
        events(run_dir).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    )
    return {group.title: [chart.title for chart in group.chart] for group in found.category}


def test_the_layout_has_the_charts_that_there_are(tmp_path: Path) -> None:
    tracker = open_main(tmp_path, tensorboard=True)
    row = {"skipped_updates/generator": 0.0, "speed/step_seconds": 0.5, "gradient_norm/generator": 1.0}
    tracker.scalars(10, 64, {**row, "loss/generator": 1.0})
    before = {"players": ["losses", "gradient norms"], "speed": ["seconds per step"]}
    assert layout(tmp_path) == before
    tracker.scalars(20, 64, {**row, "fid[classifier]": 5.0, "skipped_updates/generator": 1.0, "loss/r1": 0.5})
    tracker.scalars(30, 64, row)
    tracker.close()
    whole = {
        "players": ["losses", "gradient norms"], "penalties": ["gradient penalties"], "metrics": ["FID"],
        "speed": ["seconds per step"], "health": ["skipped updates"],
    }  # fmt: skip
    assert layout(tmp_path) == whole
    assert len(events(tmp_path).Tensors("custom_scalars__config__")) == 2, "only when it changes"
    for resumed, expected in ((30, whole), (20, whole), (10, before), (None, before)):
        tracker = open_main(tmp_path, resumed, tensorboard=True)
        tracker.scalars(40, 64, {**row, "loss/generator": 1.0})
        tracker.close()
        assert layout(tmp_path) == expected
    assert len(events(tmp_path).Tensors("custom_scalars__config__")) == 1, "those of the steps given up are gone"


def test_a_layout_that_could_not_be_written_comes_with_the_next_row(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    tracker = open_main(tmp_path, tensorboard=True)
    log(tracker, range(1, 2))
    (tmp_path / "tensorboard").unlink()
    log(tracker, range(2, 3))
    tracker.close()
    assert layout(tmp_path) == {"players": ["losses"]}


@every_scalar
def test_every_scalar_is_in_a_chart_or_known_not_to_be(name: str) -> None:
    charts = [chart for group in custom_layout([name]).values() for chart in group]
    assert len(charts) == (0 if name in WITHOUT_CHART else 1)
