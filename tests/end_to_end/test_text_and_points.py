"""Text and points as a user trains them: what a run leaves, draws and exports, and that it resumes bitwise."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import distgan
from distgan.cli import main
from distgan.data.index.file import INDEX_NAME
from distgan.data.packing.pack import pack
from distgan.errors import UserError
from distgan.inference.export import export, load_generator
from distgan.inference.sample import sample, sample_paths
from distgan.networks.layers.virtual_batch_norm import VirtualBatchNorm
from distgan.training.evaluations import Evaluations
from distgan.training.trace import trace
from tests.ranks import RankPool
from tests.runs import differing, losses, rows, tensors
from tests.unit.test_index import rewrite

VERSES = ["the cat sat on the mat", "a dog ran", "the dog sat", "on the cat a mat", "ran the cat"]


def recipe(folder: Path, kind: str, **data: Any) -> Path:
    """A run of seconds, bitwise reproducible."""
    network = {
        "architecture": "characters" if kind == "text" else "mlp",
        "normalization": "none",
        "width": 8,
        "depth": 1,
    }
    values = {
        "run_dir": str(folder / "run"),
        "data": {"kind": kind, "path": str(folder / "shards"), "num_workers": 0, **data},
        "generator": {**network, "latent_size": 4, "latent_distribution": "normal"},
        "discriminator": network,
        "objective": {"adversarial": "wasserstein", "gradient_penalty": {}},
        "training": {"steps": 6, "batch_size": 8, "critic_steps": 2, "deterministic": True},
        "checkpoint": {"every": 2, "keep": 100},
        "monitoring": {"every": 2, "samples_every": 3, "num_samples": 5},
        "evaluation": {"every": 3, "num_samples": 40, "batch_size": 16, "cache_dir": str(folder / "cache")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def train(config: Path, *overrides: str) -> str:
    return distgan.train(distgan.load_config(config, overrides)).outcome


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """The folder of a finished run on text."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "verses.txt").write_text("\n".join(f"{verse} {i}" for i in range(30) for verse in VERSES))
    pack(folder / "verses.txt", folder / "shards", held_out=0.3, workers=1)
    assert ranks.run(2, train, recipe(folder, "text", length=16)) == ["finished"] * 2
    return folder


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """The folder of a finished run on points."""
    folder = tmp_path_factory.mktemp("points")
    pack("builtin:ring", folder / "shards", points=200, workers=1)
    assert ranks.run(2, train, recipe(folder, "points")) == ["finished"] * 2
    return folder


def test_a_run_on_text_leaves_lines_and_divergences(text: Path) -> None:
    names = sorted(path.name for path in (text / "run" / "samples").iterdir())
    assert names == [f"step-{step:08d}.txt" for step in (0, 3, 6)]
    lines = (text / "run" / "samples" / names[-1]).read_text().splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= 16
    values = [row["ngram_js[4]"] for row in rows(text / "run") if "ngram_js[4]" in row]
    assert len(values) == 3
    assert all(0 < value <= 1 for value in values)
    events = b"".join(path.read_bytes() for path in (text / "run" / "tensorboard").iterdir())
    assert all(line.encode() in events for line in lines)


def test_text_resumes_bitwise_on_as_many_ranks(text: Path, tmp_path: Path, ranks: RankPool) -> None:
    config = text / "recipe.yaml"
    elsewhere = f"run_dir={tmp_path / 'run'}"
    assert ranks.run(2, train, config, elsewhere, "training.steps=4") == ["finished"] * 2
    assert ranks.run(2, train, config, elsewhere) == ["finished"] * 2
    assert differing(tensors(text / "run", 6), tensors(tmp_path / "run", 6)) == []
    assert losses(text / "run")[6] == losses(tmp_path / "run")[6]


def refused(config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        train(config, *overrides)
    return str(error.value)


def test_text_whose_characters_are_numbered_otherwise(text: Path, tmp_path: Path, ranks: RankPool) -> None:
    """The fingerprint does not tell: it is of the shards, and the vocabulary is the index's."""
    shutil.copytree(text / "shards", tmp_path / "shards")
    shutil.copytree(text / "run", tmp_path / "run")
    rewrite(tmp_path / "shards" / INDEX_NAME, lambda header, table, body: table["vocabulary"].append("\u00e9"))
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'shards'}", "training.steps=8"]
    (said,) = ranks.run(1, refused, text / "recipe.yaml", *overrides)
    assert "its text has other characters than that of data.path" in said


def test_text_is_drawn_and_exported(text: Path, tmp_path: Path) -> None:
    sample(text / "run", tmp_path / "few.txt", number=7, batch_size=3)
    exported = export(text / "run", tmp_path / "exported")
    sample(exported, tmp_path / "again.txt", number=7, batch_size=7)
    assert (tmp_path / "few.txt").read_bytes() == (tmp_path / "again.txt").read_bytes()
    generator = load_generator(exported)
    made = generator(generator.latents(7))
    assert made.shape == (7, len(generator.vocabulary or ()), 16)
    assert generator.decode(made) == (tmp_path / "few.txt").read_text().splitlines()
    for out in ("x.png", "x", "x.npy"):
        with pytest.raises(UserError, match=rf"--out \S+{re.escape(out)}: .*text; .*\.txt"):
            sample(exported, tmp_path / out)
    with pytest.raises(UserError, match=r"--interpolate .* found one of text"):
        sample_paths(exported, tmp_path / "x.png", steps=3)


def test_points_leave_pictures_and_modes(points: Path) -> None:
    names = sorted(path.name for path in (points / "run" / "samples").iterdir())
    assert names == [f"step-{step:08d}.png" for step in (0, 3, 6)]
    assert Image.open(points / "run" / "samples" / names[-1]).size == (512, 512)
    assert all(0 <= row["modes"] <= 8 for row in rows(points / "run") if "modes" in row)


def test_points_are_drawn_and_exported(points: Path, tmp_path: Path) -> None:
    exported = export(points / "run", tmp_path / "exported")
    sample(exported, tmp_path / "p.npy", number=9, batch_size=4)
    generator = load_generator(exported)
    found = np.load(tmp_path / "p.npy", allow_pickle=False)
    assert (found.shape, found.dtype) == ((9, 2), np.float32)
    assert np.allclose(found, generator(generator.latents(9)).numpy(), atol=1e-6)
    sample(exported, tmp_path / "p.png", number=9)
    assert Image.open(tmp_path / "p.png").size == (512, 512)
    with pytest.raises(UserError, match=r"--out \S+folder: .*points; .*\.png or \.npy"):
        sample(exported, tmp_path / "folder")
    with pytest.raises(UserError, match=r"decode: .* found one of points"):
        generator.decode(generator(generator.latents(1)))


def test_trace_and_evaluate(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = list(trace(distgan.load_config(text / "recipe.yaml"), 0, 1, world_size=2))
    assert len(records) == 16
    assert {record["shard"] for record in records} == {"shard-000000.tar"}
    main(["evaluate", str(text / "run")])
    last = [row for row in rows(text / "run") if "ngram_js[4]" in row][-1]
    assert f'"ngram_js[4]": {last["ngram_js[4]"]}' in capsys.readouterr().out


def test_a_network_that_no_memory_holds(text: Path, tmp_path: Path) -> None:
    shutil.copytree(text / "shards", tmp_path / "shards")
    wide = ("generator.width=65536", "generator.latent_size=65536", "data.length=65536")
    with pytest.raises(UserError, match="width, depth and resolution: not enough memory"):
        train(recipe(tmp_path, "text"), *wide)


def test_a_reference_batch_passes_once_for_all_batches_of_an_evaluation(
    points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = batches = 0
    normalize = VirtualBatchNorm.forward

    def count(layer: VirtualBatchNorm, activations: torch.Tensor) -> torch.Tensor:
        nonlocal passes, batches
        passes += len(activations) == 7
        batches += len(activations) == 16
        return normalize(layer, activations)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before = passes, batches
            result = function(*arguments, **options)
            found.append((passes - before[0], batches - before[1]))
            return result

        return call

    found: list[tuple[int, int]] = []
    monkeypatch.setattr(VirtualBatchNorm, "forward", count)
    monkeypatch.setattr(Evaluations, "measure", counted(Evaluations.measure))
    shutil.copytree(points / "shards", tmp_path / "shards")
    train(
        recipe(tmp_path, "points"), "generator.normalization=virtual", "generator.reference_size=7",
        "evaluation.num_samples=48", "training.steps=3",
    )  # fmt: skip
    counted(distgan.evaluate)(tmp_path / "run")
    counted(sample)(tmp_path / "run", tmp_path / "points.npy", number=32, batch_size=16)
    assert found == [(1, 3), (1, 3), (1, 3), (1, 2)]
