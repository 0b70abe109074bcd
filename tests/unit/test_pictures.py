"""Grids and PNG files of samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distgan.monitoring import pictures


@given(
    number=st.integers(1, 20),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    columns=st.none() | st.integers(1, 25),
)
def test_each_image_is_at_its_place(number: int, channels: int, height: int, width: int, columns: int | None) -> None:
    images = torch.randint(1, 256, (number, channels, height, width), dtype=torch.uint8)
    sheet = pictures.grid(images, columns)
    across = (sheet.shape[2] + 2) // (width + 2)
    assert across == min(columns, number) if columns else across**2 >= number > (across - 1) ** 2
    covered = torch.zeros_like(sheet, dtype=torch.bool)
    for place, image in enumerate(images):
        top, left = (place // across) * (height + 2), (place % across) * (width + 2)
        here = (slice(None), slice(top, top + height), slice(left, left + width))
        assert torch.equal(sheet[here], image)
        covered[here] = True
    assert not sheet[~covered].any(), "black everywhere else"


def test_grid_by_hand() -> None:
    images = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1, 1)
    assert pictures.grid(images, 2).tolist() == [[[1, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]]]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(tmp_path: Path, channels: int, mode: str) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    pictures.save_png(tmp_path / "new" / "folder" / "a.png", image)
    with Image.open(tmp_path / "new" / "folder" / "a.png") as read:
        assert read.mode == mode
        assert np.array_equal(np.atleast_3d(np.asarray(read)), image.permute(1, 2, 0).numpy())
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a.png"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "000000.png").symlink_to(tmp_path / "outside")
    pictures.save_folder(tmp_path / "samples", torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "samples" / "000000.png").is_symlink()


def test_a_failed_write_leaves_the_old_picture_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    pictures.save_png(tmp_path / "a.png", image)
    before = (tmp_path / "a.png").read_bytes()

    def fail(*names: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        pictures.save_png(tmp_path / "a.png", image + 9)
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_is_numbered_from_start(tmp_path: Path) -> None:
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    pictures.save_folder(tmp_path, images, start=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000009.png", "000010.png", "000011.png"]
    with Image.open(tmp_path / "000011.png") as read:
        assert np.asarray(read).max() == 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_hold_their_frames(tmp_path: Path, channels: int, suffix: str) -> None:
    frames = torch.zeros(4, channels, 6, 8, dtype=torch.uint8)
    for number, frame in enumerate(frames):
        frame[:, :, 2 * number :] = 50 * (number + 1)
    path = tmp_path / "new" / f"a.{suffix.upper()}"
    pictures.save_animation(path, frames, milliseconds=120)
    with Image.open(path) as read:
        assert (read.format, read.n_frames, read.info["loop"]) == (suffix.upper(), 4, 0)  # type: ignore[attr-defined]
        for number, frame in enumerate(frames):
            read.seek(number)
            pixels = np.asarray(read.convert("RGB"))
            assert np.array_equal(pixels, frame.expand(3, -1, -1).permute(1, 2, 0).numpy())
            assert read.info["duration"] == 120
