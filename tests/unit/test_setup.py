"""What a run says before its first step."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distgan.config import load_config
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.training.setup import check_files
from distgan.training.warnings import log_warnings, run_warnings
from tests.runs import recipe
from tests.shards import build_index, write_numbered, write_tar


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


@pytest.mark.parametrize(
    ("pictures", "channels", "warned"),
    [("color", 1, True), ("color", 3, False), ("gray as RGB", 1, False), ("gray", 1, False)],
)
def test_colors_that_are_trained_in_gray(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pictures: str, channels: int, warned: bool
) -> None:
    """JPEGs tint gray by a few levels; that is no color."""
    samples = {}
    for number in range(12):
        level = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        pixels = level if pictures == "color" and number % 2 else level[..., :1].repeat(3, 2)
        picture, file = Image.fromarray(pixels[..., 0] if pictures == "gray" else pixels), io.BytesIO()
        picture.save(file, "JPEG", quality=75)
        samples[f"{number}.jpg"] = file.getvalue()
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", samples)
    config = load_config(recipe(tmp_path, tmp_path / "shards", data={"channels": channels}))
    index = build_index(str(tmp_path / "shards"))
    caplog.set_level(logging.WARNING, "distgan")
    log_warnings(config, index, Runtime())
    said = [record.getMessage() for record in caplog.records if "channels" in record.getMessage()]
    assert len(said) == warned
    assert not warned or said[0].endswith("are in color; set data.channels=3 to train in color")


def test_an_unreadable_image_is_left_to_the_training(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", {f"{number}.png": b"damaged" for number in range(40)})
    config = load_config(recipe(tmp_path, tmp_path / "shards", data={"channels": 1}))
    said = run_warnings(config, build_index(str(tmp_path / "shards")), torch.device("cpu"))
    assert not any("data.channels" in text for text in said)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ({"metric": "fid", "detector": {"detector": "inception", "weights": "none.pth"}}, "weights = none.pth"),
        ({"metric": "fid", "real_statistics": "none.npz"}, "real_statistics = none.npz"),
    ],
)
def test_files_of_evaluations_are_looked_for_at_the_start(tmp_path: Path, metric: dict[str, Any], said: str) -> None:
    given = {"every": 1, "detector": "inception", "metrics": [metric]}
    path = recipe(tmp_path, tmp_path, evaluation=given)
    with pytest.raises(UserError, match=f"{said}: no such file"):
        check_files(load_config(path))
    check_files(load_config(path, ["evaluation.every=0"]))
