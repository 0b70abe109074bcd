"""An autoencoder from training to the decoder of a generator of its latents, and commands that mean nothing for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distgan
from distgan.autoencoders.encoding import encode
from distgan.autoencoders.loading import load_autoencoder
from distgan.config import AutoencoderConfig
from distgan.config.autoencoder import parse_autoencoder
from distgan.data.index.loading import load_index
from distgan.data.order import make_order
from distgan.data.reader import read_samples
from distgan.errors import UserError
from distgan.inference.export import export, load_generator
from distgan.inference.generation import ImageSource
from distgan.inference.sample import sample
from distgan.inference.torch_export import export_program
from distgan.networks import build_discriminator
from distgan.networks.shape import sample_shape
from tests.end_to_end.test_latents import latent_recipe, train
from tests.latents import Pooled
from tests.ranks import RankPool
from tests.runs import recipe, rows, tensors

AUTOENCODER = {
    "architecture": "autoencoder", "width": 4, "depth": 1, "downsampling": 2, "latent_size": 2 * 64,
    "latent_distribution": "normal",
}  # fmt: skip
EVALUATION = {"every": 4, "num_samples": 50, "detector": "tests.latents:Pooled"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool, digits: Path) -> Path:
    """A trained autoencoder in `run`, its latents of the digits in `latents`."""
    folder = tmp_path_factory.mktemp("autoencoder")
    recipe(
        folder, digits, generator=AUTOENCODER, discriminator={"architecture": "patchgan", "layers": 1},
        objective={"adversarial": "hinge", "r1": None, "reconstruction": {"adversarial_start_kimg": 0.02}},
        training={"steps": 4, "critic_steps": 1}, monitoring={"every": 2, "samples_every": 4},
        evaluation={**EVALUATION, "cache_dir": str(folder / "cache")},
    )  # fmt: skip
    assert ranks.run(2, train, folder / "recipe.yaml") == ["finished"] * 2
    section = parse_autoencoder(str(folder / "run"), [])
    assert section == AutoencoderConfig.model_validate({"autoencoder": "distgan", "path": str(folder / "run")})
    encode(str(digits), folder / "latents", section, resolution=16, channels=1, images=True, scale=[2.0], shift=[0.5])
    return folder


def first_images(folder: Path, digits: Path, count: int) -> torch.Tensor:
    """The first images of the training's order, read without the code under test: in [-1, 1]."""
    data = distgan.load_config(folder / "recipe.yaml").data
    index = load_index(str(digits))
    pixels = read_samples(data, index, make_order(data, 7, index).samples(np.arange(count))).data
    return pixels.float() / 127.5 - 1


def test_a_grid_has_reals_beside_their_reconstructions(folder: Path, digits: Path) -> None:
    grid = np.asarray(Image.open(folder / "run" / "samples" / "step-00000004.png"))
    assert grid.shape == (2 * 18 - 2, 4 * 18 - 2)
    images = first_images(folder, digits, 4)
    with torch.no_grad():
        made = load_generator(folder / "run")(images)
    for number in range(4):
        left, upper = number % 2 * 36, number // 2 * 18
        for image, place in ((images, left), (made, left + 18)):
            expected = ((image[number, 0] + 1) * 127.5).round().clamp(0, 255)
            cell = grid[upper : upper + 16, place : place + 16].astype(int)
            assert np.abs(cell - expected.numpy()).max() <= 1


def train_unreadable(file: Path) -> str:
    """Train with images of sample grids that rank 0 alone cannot read. Return the error."""

    def draw(self: ImageSource, purpose: str, positions: torch.Tensor) -> None:
        raise UserError(f"{purpose}: shard gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSource, "draw", draw)
        with pytest.raises(UserError) as caught:
            train(file)
    return str(caught.value)


def test_all_ranks_learn_that_images_of_a_grid_are_unreadable(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    recipe(
        tmp_path, digits, generator=AUTOENCODER, discriminator={"architecture": "patchgan", "layers": 1},
        objective={"adversarial": "hinge", "r1": None, "reconstruction": {}},
        training={"steps": 2, "critic_steps": 1}, monitoring={"samples_every": 2},
    )  # fmt: skip
    errors = ranks.run(2, train_unreadable, tmp_path / "recipe.yaml")
    assert errors == ["rank 0: sample grid: shard gone"] * 2


def test_fid_is_of_reconstructions(folder: Path, digits: Path) -> None:
    found = [row["fid[Pooled]"] for row in rows(folder / "run") if "fid[Pooled]" in row]
    images = first_images(folder, digits, 50)
    with torch.no_grad():
        made = load_generator(folder / "run")(images)
    mean = Pooled()(((made + 1) * 127.5).round().clamp(0, 255)).double().mean(0)
    data, index = distgan.load_config(folder / "recipe.yaml").data, load_index(str(digits))
    reals = Pooled()(read_samples(data, index, range(len(index))).data).double().mean(0)
    assert len(found) == 2
    assert found[-1] >= (mean - reals).square().sum().item() * 0.999, "the squared distance of means and more"
    assert distgan.evaluate(folder / "run")["fid[Pooled]"] == pytest.approx(found[-1], rel=1e-4)
    more = distgan.evaluate(folder / "run", ["evaluation.num_samples=500"])["fid[Pooled]"]
    assert more != found[-1], "images come again after an epoch"


def test_the_adversarial_term_starts_after_20_images(folder: Path) -> None:
    weights = [row["generator/adversarial_weight"] for row in rows(folder / "run") if "loss/l1" in row]
    # Steps 1 and 2 begin at 0 and 16 images; the ratio of gradients is above 0 from then on.
    assert weights[0] == 0
    assert weights[1] > 0


def test_the_discriminator_waits_until_then(folder: Path) -> None:
    """After 2 steps it is as it was built, but for batch norm; Adam has counted the 2 steps that follow."""
    config = distgan.load_config(folder / "recipe.yaml")
    built = build_discriminator(config.discriminator, sample_shape(config.data), seed=config.seed)
    before, after = (tensors(folder / "run", step) for step in (2, 4))
    for name, weight in built.named_parameters():
        assert torch.equal(before[f"discriminator/{name}"], weight)
        assert after[f"discriminator_optimizer/{name}/step"] == 2
        # The bias of logits has no gradient while all of them are inside the margins of the hinge loss.
        assert weight.numel() == 1 or not torch.equal(after[f"discriminator/{name}"], weight)
    assert not any(key.startswith("discriminator_optimizer/") for key in before)
    assert before["generator_optimizer/encoder.output.weight/step"] == 2


def test_moments_are_those_of_the_average(folder: Path, digits: Path) -> None:
    config = distgan.config.DataConfig(kind="latents", path="x", channels=2, resolution=8)
    moments = read_samples(config, load_index(str(folder / "latents")), range(3)).data
    images = distgan.load_config(folder / "recipe.yaml").data
    pixels = read_samples(images, load_index(str(digits)), range(3)).data.float() / 127.5 - 1
    with torch.no_grad():
        expected = load_generator(folder / "run").network.encode(pixels)
    torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5)


def test_a_generator_of_its_latents_decodes_by_run_or_export(folder: Path, tmp_path: Path, ranks: RankPool) -> None:
    exported = export(folder / "run", tmp_path / "exported")
    by_run, by_export = (
        load_autoencoder(parse_autoencoder(str(path), [])) for path in (folder / "run", exported)
    )  # fmt: skip
    assert by_run.hash == by_export.hash
    data = {"kind": "latents", "resolution": 8, "channels": 2, "mirror": False, "decoder": str(folder / "run")}
    training = {"steps": 2, "batch_size": 8, "critic_steps": 1}
    evaluation = {**EVALUATION, "every": 2, "cache_dir": str(folder / "cache")}
    latent_recipe(tmp_path, folder / "latents", data=data, training=training, evaluation=evaluation)
    assert ranks.run(1, train, tmp_path / "recipe.yaml") == ["finished"]
    generator = load_generator(tmp_path / "run")
    latents = generator.latents(3)
    with torch.no_grad():
        expected = by_run.module.network.decode(generator.network(latents) / 2 + 0.5)
    torch.testing.assert_close(generator(latents), expected)
    whole = export(tmp_path / "run", tmp_path / "whole")
    shutil.move(folder / "run", folder / "moved")
    try:
        torch.testing.assert_close(load_generator(whole)(latents), expected, rtol=1e-4, atol=1e-5)
        assert np.isfinite(distgan.evaluate(tmp_path / "run", [f"data.decoder={exported}"])["fid[Pooled]"])
    finally:
        shutil.move(folder / "moved", folder / "run")
    described = json.loads((whole / "config.json").read_text())
    described["decoder"]["architecture"]["generator"]["architecture"] = "os:getcwd"
    (whole / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="os") as caught:
        load_generator(whole)
    assert "\n" not in str(caught.value)


def test_what_means_nothing_for_an_autoencoder(folder: Path, digits: Path, tmp_path: Path) -> None:
    for refused in (
        lambda: sample(folder / "run", tmp_path / "grid.png"),
        lambda: export_program(folder / "run", tmp_path / "a.pt2"),
        lambda: distgan.evaluate(folder / "run", truncation=0.5),
        lambda: load_generator(folder / "run").latents(2),
    ):
        with pytest.raises(UserError, match=r"an autoencoder reconstructs images and draws none; encode images with"):
            refused()
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_does_not_fit(folder: Path, digits: Path, tmp_path: Path) -> None:
    section = parse_autoencoder(str(folder / "run"), [])
    with pytest.raises(UserError, match=r"trained on 1 x 16 x 16; pass --resolution 16 --channels 1"):
        encode(str(digits), tmp_path / "a", section, resolution=32, channels=1)
    with pytest.raises(UserError, match=r"latents of 2 x 3 x 3: the decoder was trained on 2 x 8 x 8"):
        load_autoencoder(section).decode(torch.zeros(1, 2, 3, 3))
    values = recipe(tmp_path, digits, training={"steps": 1, "batch_size": 4, "critic_steps": 1})
    assert train(values) == "finished"
    with pytest.raises(UserError, match="found a generator of architecture dcgan, expected an autoencoder"):
        load_autoencoder(parse_autoencoder(str(tmp_path / "run"), []))
