"""A stranger's code and data in whole runs: killed, resumed, evaluated, exported, loaded."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import distgan
from distgan import extensions
from distgan.cli import main
from distgan.data.index.rebuild import write_index
from distgan.errors import UserError
from tests.engines import LAUNCHED, needs
from tests.ranks import Job, free_port
from tests.runs import differing, recipe, rows, tensors, wait_for_checkpoint

PLUGINS = Path(__file__).parents[1] / "plugins"

SECTIONS: dict[str, Any] = {
    "generator": {
        "architecture": "lab.nets:Generator", "hidden": 16, "latent_size": 8,
        "optimizer": {"name": "torch.optim:AdamW", "weight_decay": 0.01, "betas": [0.5, 0.9]},
    },
    "discriminator": {"architecture": "lab.nets:Discriminator", "hidden": 8},
    "objective": {
        "adversarial": {"family": "lab.losses:Margin", "margin": 0.5},
        "r1": {"gamma": 1.0, "every": 3},
        "terms": [
            {"term": "lab.losses:ModeSeeking", "weight": 0.1},
            {"term": "lab.losses:FeatureNorm", "player": "discriminator", "sigma": 0.2},
        ],
        "augmentation": {"augmentation": "lab.augmentation:Fade", "probability": 0.3, "strength": 0.8},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package can be imported, as by PYTHONPATH, and is not allowed yet."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setattr(extensions, "_packages", set())
    monkeypatch.setattr(extensions, "_paths", set())
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lab", "mine")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as 16-bit scans with labels and captions; a fifth are negatives, two have no caption."""
    folder = tmp_path_factory.mktemp("scans")
    digits = load_digits()
    with wds.ShardWriter(str(folder / "%03d.tar"), maxcount=500, verbose=0) as writer:
        for number, (levels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            light, file = levels.repeat(2, 0).repeat(2, 1) / 16, io.BytesIO()
            light = 1 - light if number % 5 == 0 else light
            Image.fromarray((65535 * light).round().astype(np.uint16)).save(file, "PNG")
            caption = {} if number in (3, 900) else {"txt": "a negative" if number % 5 == 0 else "a scan"}
            writer.write({"__key__": f"{number:04d}", "png": file.getvalue(), "cls": int(label), **caption})
    write_index(str(folder))
    return folder


def write_recipe(folder: Path, shards: Path, **sections: Any) -> str:
    data = {"stages": {"stages": "lab.data:stages", "gamma": 1.2, "exposure": 0.1}, "max_failure_rate": 0.01}
    path = recipe(folder, shards, data=data, **sections)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **SECTIONS}))
    return str(path)


def train(config: str, world_size: int, *arguments: str, engine: str = "ddp") -> None:
    job = Job(world_size, ["train", config, *arguments], environment=LAUNCHED[engine])
    assert job.wait() == [0] * world_size


SLOW = pytest.mark.slow
"""Of what `test_killed_at_any_step_and_resumed_bitwise` shows too."""


@pytest.mark.parametrize(
    "engine", [pytest.param("one process", marks=SLOW), pytest.param("ddp", marks=SLOW), needs("fsdp"), needs("zero2")]
)
def test_a_run_is_resumed_bitwise(tmp_path: Path, scans: Path, engine: str) -> None:
    world_size, launched = (1, "ddp") if engine == "one process" else (2, engine)
    config = write_recipe(tmp_path, scans)
    for folder, parts in (("whole", [6]), ("parts", [4, 6])):
        for steps in parts:
            train(config, world_size, f"training.steps={steps}", f"run_dir={tmp_path / folder}", engine=launched)
    found, expected = tensors(tmp_path / "parts", 6), tensors(tmp_path / "whole", 6)
    assert differing(found, expected) == []
    names = {name.partition("/")[2] for name in expected}
    assert {"layers.0.running_mean", "features.2.parametrizations.weight.0._u"} <= names
    last = rows(tmp_path / "whole")[-1]
    assert {"loss/generator.ModeSeeking", "loss/discriminator.FeatureNorm"} <= last.keys()


@pytest.mark.parametrize("name", ["Adafactor", "SGD"])
def test_optimizers_of_torch_resume_bitwise(tmp_path: Path, scans: Path, name: str) -> None:
    """Adafactor keeps other tensors for vectors than for matrices; SGD without momentum keeps none."""
    config = write_recipe(tmp_path, scans)
    optimizer = f"generator.optimizer={{name: 'torch.optim:{name}'}}"
    for folder, parts in (("whole", [4]), ("parts", [2, 4])):
        for steps in parts:
            train(config, 1, optimizer, f"training.steps={steps}", f"run_dir={tmp_path / folder}")
    assert differing(tensors(tmp_path / "parts", 4), tensors(tmp_path / "whole", 4)) == []


def test_images_of_any_size(tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 pixels, which no built-in network makes: trained, evaluated with the trained classifier, and loaded."""
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))
    evaluation = {"every": 2, "num_samples": 32}
    train(write_recipe(tmp_path, scans, training={"steps": 2}, evaluation=evaluation), 1, "data.resolution=20")
    assert rows(tmp_path / "run")[-1]["fid[classifier]"] > 0
    generator = distgan.load_generator(tmp_path / "run", trust_code=["lab"])
    assert generator(generator.latents(2)).shape == (2, 1, 20, 20)


def test_killed_at_any_step_and_resumed_bitwise(tmp_path: Path, scans: Path) -> None:
    """With other numbers of data loader workers each time."""
    config = write_recipe(tmp_path, scans)
    train(config, 2, f"run_dir={tmp_path / 'whole'}")
    job = Job(2, ["train", config, "data.num_workers=1"])
    wait_for_checkpoint(tmp_path / "run", 4, job)
    job.kill(1)
    train(config, 2, "data.num_workers=2")
    assert differing(tensors(tmp_path / "run", 12), tensors(tmp_path / "whole", 12)) == []


def test_evaluated_exported_and_loaded_with_and_without_trust(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    train(write_recipe(tmp_path, scans, training={"steps": 2}, evaluation={"num_samples": 32}), 1)
    with pytest.raises(UserError, match="--allow lab"):
        distgan.load_generator(run)
    with pytest.raises(SystemExit):
        main(["export", str(run), str(tmp_path / "refused")])
    assert "--allow lab" in capsys.readouterr().err
    assert "lab" not in sys.modules
    main(["evaluate", str(run), "--allow", "lab"])
    assert json.loads(capsys.readouterr().out)["fid[classifier]"] > 0
    monkeypatch.setattr(extensions, "_packages", set())
    monkeypatch.setattr(extensions, "_paths", set())
    main(["export", str(run), str(tmp_path / "exported"), "--allow", "lab"])
    monkeypatch.setattr(extensions, "_packages", set())
    monkeypatch.setattr(extensions, "_paths", set())
    with pytest.raises(UserError, match="--allow lab"):
        distgan.load_generator(tmp_path / "exported")
    generator = distgan.load_generator(tmp_path / "exported", trust_code=["lab"])
    images = generator(generator.latents(3))
    assert images.shape == (3, 1, 16, 16)
    torch.testing.assert_close(images, distgan.load_generator(run, trust_code=["lab"])(generator.latents(3)))


def test_a_generator_loads_without_the_code_of_the_discriminator(tmp_path: Path, scans: Path) -> None:
    package = tmp_path / "site" / "mine"
    package.mkdir(parents=True)
    for name in ("__init__.py", "nets.py"):
        shutil.copy(PLUGINS / "lab" / name, package / name)
    (package / "critic.py").write_text("from mine.nets import Discriminator")
    sys.path.insert(0, str(tmp_path / "site"))
    try:
        config = write_recipe(tmp_path, scans, training={"steps": 1})
        train(
            config,
            1,
            "generator.architecture=mine.nets:Generator",
            "discriminator.architecture=mine.critic:Discriminator",
        )
        (package / "critic.py").unlink()
        assert distgan.load_generator(tmp_path / "run", trust_code=["mine"])(torch.zeros(1, 8)).shape == (1, 1, 16, 16)
    finally:
        sys.path.remove(str(tmp_path / "site"))


def test_changed_code_is_accepted_only_when_asked(tmp_path: Path, scans: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(PLUGINS / "lab", site / "lab")
    sys.path.insert(0, str(site))
    try:
        config, log = write_recipe(tmp_path, scans), tmp_path / "log"
        train(config, 1, "training.steps=1")
        with open(site / "lab" / "losses.py", "a") as file:
            file.write("# changed\n")
        assert Job(1, ["train", config, "training.steps=2"], log=log).wait() == [2]
        assert "package lab" in log.read_text()
        assert "--accept code" in log.read_text()
        train(config, 1, "training.steps=2", "--accept", "code")
    finally:
        sys.path.remove(str(site))


def test_code_edited_during_a_run_is_not_that_of_the_run(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has the digest of the code that trained it, so that a resume notices the edit."""
    site = tmp_path / "site"
    shutil.copytree(PLUGINS / "lab", site / "lab")
    monkeypatch.syspath_prepend(str(site))

    def edit(step: int) -> None:
        with open(site / "lab" / "losses.py", "a") as file:
            file.write("# edited\n")

    config = distgan.load_config(write_recipe(tmp_path, scans, training={"steps": 4}))
    distgan.train(config, callbacks=distgan.Callbacks(on_step=edit))
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    codes = [json.loads((folder / "state.json").read_text())["code"] for folder in folders]
    assert len(codes) > 1
    assert all(code == codes[0] for code in codes)
    with pytest.raises(UserError, match="--accept code"):
        distgan.train(distgan.load_config(write_recipe(tmp_path, scans, training={"steps": 5})))


def test_a_metric_that_is_not_allowed_is_told_once(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    shutil.copy(PLUGINS / "lab" / "metrics.py", tmp_path / "site" / "strange.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    train(write_recipe(tmp_path, scans, training={"steps": 1}), 1, "evaluation.metrics=['strange:Sharpness']")
    log = tmp_path / "log"
    assert Job(2, ["evaluate", str(tmp_path / "run"), "--allow", "lab"], log=log).wait() == [2, 2]
    (line,) = [line for line in log.read_text().splitlines() if "error: " in line]
    assert "--allow strange" in line
    assert "Traceback" not in log.read_text()


def test_ranks_with_other_copies_are_refused(tmp_path: Path, scans: Path) -> None:
    """As on a node whose package was not updated."""
    copies = []
    for rank in range(2):
        shutil.copytree(PLUGINS / "lab", tmp_path / f"site{rank}" / "lab")
        with open(tmp_path / f"site{rank}" / "lab" / "nets.py", "a") as file:
            file.write(f"# copy {rank}\n")
        copies.append(str(tmp_path / f"site{rank}"))
    config, log = write_recipe(tmp_path, scans), tmp_path / "log"
    command = (
        "import os, runpy, sys; sys.path.insert(0, os.environ['SITES'].split(':')[int(os.environ['RANK'])]); "
        "sys.argv[0] = 'distgan'; runpy.run_module('distgan', run_name='__main__')"
    )
    environment = {**os.environ, "SITES": ":".join(copies), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    with open(log, "w") as file:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", command, "train", config],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=file, stderr=file,
            )
            for rank in range(2)
        ]  # fmt: skip
        assert [process.wait(120) for process in ranks] == [2, 2]
    assert "the code of the package lab" in log.read_text()
