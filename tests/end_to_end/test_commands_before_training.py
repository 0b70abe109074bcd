"""Commands that need no trained run: shards of others, and mistakes that are told before training."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distgan.cli import main
from tests.commands import mistake, output
from tests.ranks import Job
from tests.runs import recipe, status


def test_index_of_tars_that_others_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for sample in range(3 + shard):
                image = io.BytesIO()
                Image.fromarray(np.full((16, 16), 40 * sample, np.uint8)).save(image, "PNG")
                for name, content in ((f"{sample}.png", image.getvalue()), (f"{sample}.json", b"{}")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    said = output(capsys, "index", str(tmp_path / "train-{0..1}.tar"))
    assert "7 samples, no labels, in 2 shards, fingerprint" in said
    one = output(capsys, "index", str(tmp_path / "train-0.tar"), "--out", str(tmp_path / "one.safetensors"))
    assert "3 samples, no labels, in 1 shard, fingerprint" in one
    config = recipe(tmp_path, tmp_path, training={"steps": 1, "batch_size": 4, "deterministic": False})
    main(["train", str(config)])
    assert status(tmp_path / "run")["outcome"] == "finished"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["data.path=/nowhere"], ["/nowhere"]),
        (["training.batch_size=18", "training.gradient_accumulation_steps=6", "data.path={digits}"], []),
        (["data.labels=true", "data.path={unlabeled}"], ["data.labels", "no labels"]),
        (["data.resolution=8"], ["data.resolution = 8", "16 to 256"]),
        (["run_dir=/proc/nothing"], ["run_dir", "/proc/nothing"]),
        (["--resume", "/nowhere"], ["/nowhere", "does not exist"]),
        (["nonsense=1"], ["unknown key 'nonsense'"]),
    ],
)
def test_mistakes_before_training(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], changes: list[str], parts: list[str]
) -> None:
    config = recipe(tmp_path, digits, training={"steps": 1, "batch_size": 16})
    if any("{unlabeled}" in change for change in changes):
        folder = tmp_path / "images"
        folder.mkdir()
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "a.png")
        output(capsys, "pack", str(folder), str(tmp_path / "unlabeled"))
    changes = [c.replace("{digits}", str(digits)).replace("{unlabeled}", str(tmp_path / "unlabeled")) for c in changes]
    if not parts:
        main(["train", str(config), *changes])
        return
    said = mistake(capsys, "train", str(config), *changes)
    for part in parts:
        assert part in said


def test_a_mistake_is_printed_once_on_several_ranks(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits)
    for change, part in (("training.stepz=1", "unknown key"), ("training.batch_size=18", "divide among 4"),
                         ("data.path=/nowhere", "/nowhere")):  # fmt: skip
        log = tmp_path / f"log-{part.split('/')[-1]}"
        assert Job(4, ["train", str(config), change], log=log).wait() == [2] * 4
        text = log.read_text()
        assert text.count("distgan: error:") == 1, text
        assert part in text
        assert "Traceback" not in text
    assert status(tmp_path / "run")["reason"].startswith("/nowhere: "), "no rank is to blame for what all find"
