"""Training where packages that are not needed by every run are not installed, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distgan.data.index.loading import load_index
from distgan.packages import OPTIONAL
from tests.runs import recipe, rows, status

HIDE = """
import importlib.metadata, sys
modules, names = {modules}, {names}
sys.modules.update(dict.fromkeys(modules))
find = importlib.metadata.distribution

def distribution(name):  # torchmetrics asks here what is installed
    if name.lower().replace("_", "-") in names:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)

importlib.metadata.distribution = distribution
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has none of them, loader processes included."""
    folder = tmp_path / "site"
    folder.mkdir()
    modules, names = [package.module for package in OPTIONAL], [package.name for package in OPTIONAL]
    (folder / "sitecustomize.py").write_text(HIDE.format(modules=modules, names=names))
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def distgan(bare: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distgan", *arguments]
    return subprocess.run(command, env=bare, capture_output=True, text=True, timeout=240)


def test_jpegs_are_packed_and_trained_on(tmp_path: Path, bare: dict[str, str]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    for number, pixels in enumerate(pictures):
        path = tmp_path / "images" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)
    packed = distgan(bare, "pack", str(tmp_path / "images"), str(tmp_path / "shards"))
    assert packed.returncode == 0, packed.stderr
    index = load_index(str(tmp_path / "shards"))
    assert len(index) == 40
    originals = {path.read_bytes() for path in (tmp_path / "images").rglob("*.jpg")}
    assert all(original in Path(index.shards[0].url).read_bytes() for original in originals)

    config = recipe(
        tmp_path, tmp_path / "shards", data={"channels": 3, "num_workers": 1}, training={"steps": 3},
        monitoring={"every": 1, "tensorboard": True},
    )  # fmt: skip
    trained = distgan(bare, "train", str(config))
    assert trained.returncode == 0, trained.stderr
    assert status(tmp_path / "run")["outcome"] == "finished"
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "tensorboard").exists()
    for package in OPTIONAL:
        lines = [line for line in trained.stderr.splitlines() if f"{package.name} is not installed" in line]
        assert len(lines) == 1
        assert package.without in lines[0]
    assert "Traceback" not in trained.stderr

    # Where simplejpeg is back, the same pixels are not promised, and the resume says so.
    command = [sys.executable, "-m", "distgan", "train", str(config), "training.steps=4"]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert resumed.returncode == 0
    assert len([line for line in resumed.stderr.splitlines() if "simplejpeg" in line and "Pillow" in line]) == 1


def test_what_needs_a_package_names_it(tmp_path: Path, bare: dict[str, str], digits: Path) -> None:
    config = recipe(tmp_path, digits, evaluation={"detector": "inception", "every": 1}, training={"steps": 1})
    for arguments, package, instead in (
        (("pack", "builtin:digits", str(tmp_path / "digits")), "scikit-learn", "images of your own"),
        (("train", str(config)), "torch-fidelity", "evaluation.detector=classifier"),
        (("probe", str(tmp_path / "run")), "scikit-learn", "distgan evaluate"),
    ):
        refused = distgan(bare, *arguments)
        assert refused.returncode == 2, refused.stderr
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("distgan: error:")]
        assert f"pip install {package}" in line
        assert instead in line
        assert "Traceback" not in refused.stderr


def test_the_doctor_lists_them(tmp_path: Path, bare: dict[str, str]) -> None:
    command = [sys.executable, "-m", "distgan", "doctor"]
    seen = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    (line,) = [line for line in seen.stdout.splitlines() if line.split()[1] == "packages"]
    assert line.startswith("warning ")
    assert all(package.name in line for package in OPTIONAL)
