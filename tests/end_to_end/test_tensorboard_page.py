"""What a TensorBoard server and a browser make of the logs of a run that was resumed."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distgan.monitoring import pictures
from distgan.monitoring.tracker import open_tracker

pytestmark = pytest.mark.slow

MAGENTA = (255, 0, 255)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1300,900",
    "--virtual-time-budget=15000",
]


def train(run_dir: Path, resume_step: int | None, steps: range, offset: float) -> None:
    """Log like a training process that is killed after the last of these steps: nothing is closed."""
    tracker = open_tracker(run_dir, tensorboard=True, resume_step=resume_step, main=True)
    tracker.text("config", "seed: 0\ndata:\n  path: shards")
    tracker.hyperparameters({"training.batch_size": 64}, ["loss/generator"])
    for step in steps:
        row = {"loss/generator": step + offset, "fid[classifier]": 1000 / step, "skipped_updates/generator": 0.0}
        tracker.scalars(step, step * 64, row)
        if step == 400 and resume_step is None:
            tracker.scalars(step + 1, 0, {"logged only in the future that was given up": 1.0})
        if step % 100 == 0:
            image = torch.tensor(MAGENTA, dtype=torch.uint8).view(1, 3, 1, 1).expand(4, 3, 32, 32)
            tracker.image(step, "samples", pictures.grid(image))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, None, range(10, 410, 10), 0.0)
    train(folder, 300, range(310, 510, 10), 0.5)
    return folder


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast loader", "python loader"])
def server(run_dir: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a TensorBoard server, with each of the two programs it reads event files with."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir / "tensorboard")]
    command += ["--host", "127.0.0.1", "--port", "0", "--load_fast", request.param]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        while "." not in get(found[0], "scalars/tags"):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)


def get(address: str, path: str, **query: str) -> Any:
    url = f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def screenshot(address: str, tab: str, folder: Path) -> np.ndarray:
    """The pixels of a tab, (900, 1300, 3), without the toolbar on top and the sidebar on the left."""
    if BROWSER is None:
        pytest.skip("no chromium here to look at the page with")
    file = folder / f"{tab}.png"
    profile = folder / f"profile-{tab}"
    command = [BROWSER, *OPTIONS, f"--user-data-dir={profile}", f"--screenshot={file}", f"{address}/#{tab}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "HOME": str(folder)})
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)[120:, 340:]


def test_each_step_is_served_once(server: str) -> None:
    tags = get(server, "scalars/tags")
    assert list(tags) == ["."], "one run"
    assert set(tags["."]) == {"loss/generator", "fid[classifier]", "progress/kimg"}
    points = get(server, "scalars/scalars", run=".", tag="loss/generator")
    before, after = range(10, 310, 10), range(310, 510, 10)
    assert [step for _, step, _ in points] == [*before, *after]
    assert [value for _, _, value in points] == [*map(float, before), *(step + 0.5 for step in after)]


def test_the_layout_is_served_once(server: str) -> None:
    groups = get(server, "custom_scalars/layout")["category"]
    assert [group["title"] for group in groups] == ["players", "metrics"]
    charts = [chart for group in groups for chart in group["chart"]]
    assert [chart["title"] for chart in charts] == ["losses", "FID"]
    for chart, tag in zip(charts, ("loss/generator", "fid[classifier]"), strict=True):
        (pattern,) = chart["multiline"]["tag"]
        found = get(server, "custom_scalars/scalars", run=".", tag=pattern)
        assert found["regex_valid"]
        assert list(found["tag_to_events"]) == [tag]


def test_pictures_texts_and_settings_are_served(server: str) -> None:
    images = get(server, "images/images", run=".", tag="samples", sample="0")
    assert [image["step"] for image in images] == [100, 200, 300, 400, 500]
    address = f"{server}/data/plugin/images/individualImage?{images[-1]['query']}"
    with urllib.request.urlopen(address, timeout=20) as answer, Image.open(io.BytesIO(answer.read())) as image:
        assert image.size == (66, 66)
        assert image.getpixel((1, 1)) == MAGENTA
    (text,) = get(server, "text/text", run=".", tag="config/text_summary")[-1:]
    assert "<code>seed: 0\ndata:\n  path: shards" in text["text"]


def test_the_page_shows_curves(server: str, tmp_path: Path) -> None:
    page = screenshot(server, "scalars", tmp_path)
    # TensorBoard's first run color; the checkbox of that color is in the sidebar, which is cut off.
    curve = np.abs(page - (255, 112, 67)).sum(-1) < 60
    assert curve.sum() > 300
    columns = np.flatnonzero(curve.any(0))
    assert columns[-1] - columns[0] > 200, "it spans a chart"


def test_the_page_shows_the_samples(server: str, tmp_path: Path) -> None:
    page = screenshot(server, "images", tmp_path)
    assert (np.abs(page - MAGENTA).sum(-1) < 30).sum() > 10_000
