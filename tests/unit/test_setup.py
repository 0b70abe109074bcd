"""What a run says before its first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from distgan.config import load_config
from distgan.data.index.build import build_index
from distgan.distributed.runtime import Runtime
from distgan.training.setup import log_warnings
from tests.runs import recipe
from tests.shards import write_numbered


@pytest.mark.parametrize(
    ("classes", "chosen", "warned"),
    [(3, {}, True), (3, {"labels": False}, False), (3, {"labels": True}, False), (0, {}, False)],
    ids=["left out", "false", "true", "no labels"],
)
def test_labels_that_nobody_chose_to_leave_unused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, classes: int, chosen: dict[str, Any], warned: bool
) -> None:
    shards = write_numbered(tmp_path / "shards", [6], classes=classes)
    config = load_config(recipe(tmp_path, shards, data=chosen))
    caplog.set_level(logging.WARNING, "distgan")
    log_warnings(config, build_index(str(shards)), Runtime())
    said = [record.getMessage() for record in caplog.records if "data.labels" in record.getMessage()]
    assert len(said) == warned
    if warned:
        assert "3 classes" in said[0]
        assert "unconditional" in said[0]
