"""`make latents`, on a budget of two steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import commands, latents


@pytest.mark.slow
def test_the_whole_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
    (tmp_path / "configs").symlink_to(commands.ROOT / "configs")
    for module in (commands, latents):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    small = ["training.steps=2", "evaluation.every=0", "monitoring.every=1"]
    out = tmp_path / "picture.png"
    arguments = ["--processes", "1", "--out", str(out), *(word for each in small for word in ("--set", each))]
    monkeypatch.setattr(sys, "argv", ["latents.py", *arguments])
    monkeypatch.chdir(tmp_path)  # load_generator finds the decoder from here, as from the root of the repository
    latents.main()
    said = capsys.readouterr().out
    assert "digits-autoencoder: " in said
    assert "digits-gat-small: " in said
    assert said.count("fid[classifier]") == 2
    picture = np.asarray(Image.open(out))
    side = 6 * 34 - 2
    assert picture.shape == (side + 22, 3 * (side + 12) - 12)
    assert picture[22:, :side].max() == 255
