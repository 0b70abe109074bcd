"""`distgan sample --interpolate`: rows of a picture or an animation, whose ends are the images of `distgan sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from distgan.cli import main
from distgan.errors import UserError
from distgan.inference.export import load_generator
from distgan.inference.generation import to_bytes
from distgan.inference.sample import sample_paths
from distgan.interpolation import lerp, slerp
from distgan.monitoring.pictures import GAP
from tests.unit.test_export import write

SIDE = 16


def cells(path: Path, rows: int, columns: int) -> NDArray[np.int64]:
    """The images of a grid: (rows, columns, 16, 16)."""
    sheet = np.asarray(Image.open(path)).astype(np.int64)
    assert sheet.shape == (rows * (SIDE + GAP) - GAP, columns * (SIDE + GAP) - GAP)
    step = SIDE + GAP
    return np.array(
        [
            [sheet[row * step :, column * step :][:SIDE, :SIDE] for column in range(columns)]
            for row in range(rows)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("linear", [False, True])
def test_a_row_goes_from_one_image_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], linear: bool
) -> None:
    source, strip = write(tmp_path / "export"), tmp_path / "strip.png"
    more = ["--linear"] if linear else []
    main(["sample", str(source), "--interpolate", "5", "--num", "3", "--seed", "9", "--out", str(strip), *more])
    assert capsys.readouterr().out.strip() == str(strip)
    found = cells(strip, 3, 5)
    main(["sample", str(source), "--num", "6", "--seed", "9", "--out", str(tmp_path / "ends")])
    ends = [np.asarray(Image.open(path)).astype(np.int64) for path in sorted((tmp_path / "ends").iterdir())]
    for row in range(3):
        # Kernels may add up differently in another batch, which can move a pixel by a level.
        assert np.abs(found[row, 0] - ends[2 * row]).max() <= 1
        assert np.abs(found[row, 4] - ends[2 * row + 1]).max() <= 1
    generator = load_generator(source)
    latents = generator.latents(6, seed=9)
    middle = (lerp if linear else slerp)(latents[0::2], latents[1::2], torch.tensor([0.5]))[:, 0]
    expected = to_bytes(generator(middle, torch.zeros(3, dtype=torch.int64)))[:, 0].numpy().astype(np.int64)
    assert np.abs(found[:, 2] - expected).max() <= 1


def test_paths_of_classes(tmp_path: Path) -> None:
    source = write(tmp_path / "export")
    sample_paths(source, tmp_path / "a.png", steps=3, number=2, labels=["b", "a"])
    found, generator = cells(tmp_path / "a.png", 2, 3), load_generator(source)
    latents = generator.latents(4)
    expected = to_bytes(generator(latents, torch.tensor([1, 1, 0, 0])))[:, 0].numpy().astype(np.int64)
    assert np.abs(found[:, [0, 2]].reshape(4, SIDE, SIDE) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_goes_to_and_fro(tmp_path: Path, suffix: str) -> None:
    source, out = write(tmp_path / "export"), tmp_path / f"a.{suffix}"
    sample_paths(source, out, steps=4, number=2, batch_size=3)
    sample_paths(source, tmp_path / "a.png", steps=4, number=2)
    rows = cells(tmp_path / "a.png", 2, 4)
    with Image.open(out) as read:
        assert read.n_frames == 6  # type: ignore[attr-defined]
        for frame, step in enumerate([0, 1, 2, 3, 2, 1]):
            read.seek(frame)
            shown = np.asarray(read.convert("L")).astype(np.int64)
            assert np.abs(shown[:SIDE, :SIDE] - rows[0, step]).max() <= 1
            assert np.abs(shown[:SIDE, SIDE + GAP :] - rows[1, step]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"steps": 1}, "--interpolate 1 .*at least 2 "),
        ({"steps": 1000}, "at most 4096 images"),
        ({"steps": 4, "number": 0}, "--num 0"),
        ({"steps": 4, "out": "folder"}, "ending in .png, .gif or .webp"),
        ({"steps": 4, "labels": ["z"]}, "--labels z"),
    ],
)
def test_impossible_paths(tmp_path: Path, arguments: dict[str, Any], part: str) -> None:
    out = tmp_path / arguments.pop("out", "out.png")
    with pytest.raises(UserError, match=part):
        sample_paths(write(tmp_path / "export"), out, **arguments)
    assert not out.exists()


def test_straight_lines_are_of_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "run", "--linear", "--out", str(tmp_path / "x.png")])
    assert "add --interpolate STEPS" in capsys.readouterr().err
