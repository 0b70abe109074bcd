"""Latents as a user trains on them: what a run leaves, draws and exports, and that it resumes bitwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distgan
from distgan.data.index.rebuild import write_index
from distgan.errors import UserError
from distgan.inference.export import export, load_generator
from distgan.inference.sample import sample
from tests.latents import CHANNELS, SIDE, latent_shards, moments
from tests.ranks import RankPool
from tests.runs import differing, losses, recipe, tensors


def latent_recipe(folder: Path, shards: Path, **sections: object) -> Path:
    network = {"architecture": "r3gan", "width": 8, "max_width": 16, "depth": 1}
    values = {
        "data": {"kind": "latents", "resolution": SIDE, "channels": CHANNELS, "mirror": True},
        "generator": network,
        "discriminator": network,
        "objective": {"adversarial": "hinge", "r1": {"gamma": 0.1}},
        "training": {"steps": 6, "batch_size": 8, "critic_steps": 1},
        "monitoring": {"every": 2, "samples_every": 3},
    }
    return recipe(folder, shards, **{**values, **sections})


def train(config: Path, *overrides: str) -> str:
    return distgan.train(distgan.load_config(config, overrides)).outcome


def refused(config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        train(config, *overrides)
    return str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """The folder of a finished run of two ranks."""
    folder = tmp_path_factory.mktemp("latents")
    latent_shards(folder / "shards", moments(40, flips=True), classes=4)
    latent_recipe(folder, folder / "shards")
    assert ranks.run(2, train, folder / "recipe.yaml") == ["finished"] * 2
    return folder


def test_a_run_resumes_bitwise_on_as_many_ranks(run: Path, tmp_path: Path, ranks: RankPool) -> None:
    elsewhere = f"run_dir={tmp_path / 'run'}"
    assert ranks.run(2, train, run / "recipe.yaml", elsewhere, "training.steps=4") == ["finished"] * 2
    assert ranks.run(2, train, run / "recipe.yaml", elsewhere) == ["finished"] * 2
    assert differing(tensors(run / "run", 6), tensors(tmp_path / "run", 6)) == []


def test_one_rank_trains_on_the_same_draws(run: Path, tmp_path: Path, ranks: RankPool) -> None:
    elsewhere = [f"run_dir={tmp_path / 'run'}", "data.num_workers=1"]
    assert ranks.run(1, train, run / "recipe.yaml", *elsewhere) == ["finished"]
    for step, values in losses(run / "run").items():
        assert values == pytest.approx(losses(tmp_path / "run")[step], rel=1e-3, abs=1e-4)


def test_another_scale_is_refused_on_resume(run: Path, tmp_path: Path, ranks: RankPool) -> None:
    """The fingerprint does not tell: it is of the shards, and the scale is the index's."""
    for folder in ("shards", "run"):
        shutil.copytree(run / folder, tmp_path / folder)
    write_index(str(tmp_path / "shards"), scale=[0.5], shift=[0.0])
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'shards'}", "training.steps=8"]
    (said,) = ranks.run(1, refused, run / "recipe.yaml", *overrides)
    assert "other latents than those of data.path: shift: found (0.0, 0.0), expected" in said


def test_latents_are_drawn_and_exported(run: Path, tmp_path: Path) -> None:
    grid = np.asarray(Image.open(run / "run" / "samples" / "step-00000006.png"))
    assert grid.shape == (2 * SIDE + 2, 2 * SIDE + 2)  # four samples in gray, for two channels
    sample(run / "run", tmp_path / "few.npy", number=5, batch_size=3)
    exported = export(run / "run", tmp_path / "exported")
    generator = load_generator(exported)
    made = generator(generator.latents(5))
    found = np.load(tmp_path / "few.npy")
    assert found.shape == (5, CHANNELS, SIDE, SIDE)
    np.testing.assert_allclose(generator.to_latents(made).numpy(), found, rtol=1e-5, atol=1e-5)
    assert generator.latent_space is not None
    back = made / torch.tensor(generator.latent_space.scale)[:, None, None]
    back = back + torch.tensor(generator.latent_space.shift)[:, None, None]
    np.testing.assert_allclose(back.numpy(), found, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="found one of latents"):
        generator.to_uint8(made)
    with pytest.raises(UserError, match="this generator makes latents"):
        sample(exported, tmp_path / "images")


def test_an_evaluation_without_metrics_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.metrics: none is named"):
        distgan.evaluate(run / "run")


METRIC = """
import torch
from torchmetrics import Metric


class MeanDifference(Metric):
    higher_is_better = False
    takes = "samples"

    def __init__(self, reals):
        super().__init__()
        self.reals = reals["rows"].double().mean((0, 2, 3))
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, samples):
        self.total += samples.double().mean((2, 3)).sum(0)
        self.count += len(samples)

    def compute(self):
        return {"": (self.total / self.count - self.reals).norm(), "real": self.reals[1]}
"""


def test_a_metric_of_samples_works_in_latent_space(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latent_metric.py").write_text(METRIC)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        "evaluation.metrics=[latent_metric:MeanDifference]", "evaluation.num_samples=20",
        f"evaluation.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    values = distgan.evaluate(run / "run", overrides)
    means = np.stack(moments(40, flips=True))[:, 0, 1].mean()
    deviation = 1 / (40 * SIDE**2) ** 0.5  # at most that of the draws from the posteriors
    assert values["MeanDifference_real"] == pytest.approx(means, abs=5 * deviation)
    assert np.isfinite(values["MeanDifference"])
