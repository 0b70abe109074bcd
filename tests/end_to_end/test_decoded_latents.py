"""A run with a decoder: its pictures, metrics, samples and exports are images, and its decoder cannot change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import distgan
from distgan.autoencoders.decoding import IMAGES
from distgan.autoencoders.encoding import encode
from distgan.config.autoencoder import parse_autoencoder
from distgan.data.reader import read_samples
from distgan.errors import UserError
from distgan.inference.export import export, load_generator
from distgan.inference.sample import sample, sample_paths
from distgan.inference.torch_export import export_program
from tests.end_to_end.test_latents import latent_recipe, refused, train
from tests.latents import LinearAutoencoder, Pooled
from tests.ranks import RankPool
from tests.runs import rows

DECODER = "tests.latents:LinearAutoencoder"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool, digits: Path) -> Path:
    """The folder of a finished run of two ranks on the latents of digits."""
    folder = tmp_path_factory.mktemp("decoded")
    section = parse_autoencoder(DECODER, [])
    encode(str(digits), folder / "shards", section, resolution=16, channels=1, images=True)
    data = {
        "kind": "latents", "resolution": 8, "channels": 4, "labels": True,
        "decoder": {"autoencoder": DECODER, "seed": 3},
    }  # fmt: skip
    evaluation = {
        "every": 2, "num_samples": 50, "detector": "tests.latents:Pooled", "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    training = {"steps": 4, "batch_size": 8, "critic_steps": 1}
    latent_recipe(folder, folder / "shards", data=data, evaluation=evaluation, training=training)
    assert ranks.run(2, train, folder / "recipe.yaml") == ["finished"] * 2
    return folder


def decoded(run: Path, purpose: str, count: int) -> torch.Tensor:
    """Images of the newest checkpoint, decoded by hand: uint8 (count, 1, 16, 16)."""
    generator = load_generator(run / "run")
    with torch.no_grad():
        made = generator.network(*generator.source(7, None).draw(purpose, torch.arange(count)))
        images = LinearAutoencoder().decode(generator.to_latents(made))
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_fid_is_of_decoded_samples_and_of_the_original_images(run: Path, digits: Path) -> None:
    """Against the definition, with scipy's square root of a matrix."""
    index = distgan.data.Loader(str(digits), batch_size=1, resolution=16, channels=1, num_workers=0).index
    config = distgan.load_config(run / "recipe.yaml").data.model_copy(
        update={"kind": "images", "resolution": 16, "channels": 1}
    )
    reals = read_samples(config, index, range(len(index))).data
    moments = []
    for images in (reals, decoded(run, "evaluation", 50)):
        features = Pooled()(images).double().numpy()
        moments.append((features.mean(0), np.cov(features, rowvar=False)))
    (m, s), (n, t) = moments
    expected = ((m - n) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    found = [row["fid[Pooled]"] for row in rows(run / "run") if "fid[Pooled]" in row]
    assert len(found) == 3
    assert found[-1] == pytest.approx(expected, rel=1e-3)
    for overrides in ([], [f"evaluation.real_images={digits}"]):
        assert distgan.evaluate(run / "run", overrides)["fid[Pooled]"] == pytest.approx(found[-1], rel=1e-6)


def test_samples_and_grids_are_images(run: Path, tmp_path: Path) -> None:
    grid = np.asarray(Image.open(run / "run" / "samples" / "step-00000004.png"))
    assert grid.shape == (34, 34)
    np.testing.assert_array_equal(grid[:16, :16], decoded(run, "sample grid", 1)[0, 0])
    sample(run / "run", tmp_path / "images", number=3, seed=7)
    expected = decoded(run, "samples", 3)
    for number in range(3):
        picture = np.asarray(Image.open(tmp_path / "images" / f"{number:06d}.png"))
        np.testing.assert_array_equal(picture, expected[number, 0])
    sample_paths(run / "run", tmp_path / "paths.png", steps=3, number=2)
    assert Image.open(tmp_path / "paths.png").size == (3 * 18 - 2, 2 * 18 - 2)


def test_an_export_holds_its_decoder(run: Path, tmp_path: Path) -> None:
    exported = export(run / "run", tmp_path / "exported")
    own, loaded = load_generator(run / "run"), load_generator(exported, trust_code=["tests"])
    assert (loaded.shape.kind, loaded.resolution, loaded.channels, loaded.network_shape.channels) == (
        "images",
        16,
        1,
        4,
    )
    inputs = own.inputs(20)
    torch.testing.assert_close(loaded(*inputs), own(*inputs), rtol=1e-4, atol=1e-4)
    assert loaded.to_uint8(loaded(*inputs)).shape == (20, 1, 16, 16)
    export(exported, tmp_path / "again")
    assert (tmp_path / "again" / "decoder.safetensors").read_bytes() == (exported / "decoder.safetensors").read_bytes()
    described = json.loads((exported / "config.json").read_text())
    described["decoder"]["hash"] = "0" * 64
    (exported / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"another hash than config\.json says"):
        load_generator(exported, trust_code=["tests"])


def test_a_program_decodes(run: Path, tmp_path: Path) -> None:
    program = torch.export.load(export_program(run / "run", tmp_path / "generator.pt2")).module()
    generator = load_generator(run / "run")
    inputs = generator.inputs(5)
    torch.testing.assert_close(program(*inputs), generator(*inputs), rtol=1e-4, atol=1e-4)


def test_another_decoder_is_refused(run: Path, tmp_path: Path, ranks: RankPool) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    overrides = [f"run_dir={tmp_path / 'run'}", "training.steps=6"]
    (said,) = ranks.run(1, refused, run / "recipe.yaml", *overrides, "data.decoder.seed=4")
    assert "saved with a decoder of hash" in said
    with pytest.raises(UserError, match="trained with a decoder of hash"):
        distgan.evaluate(run / "run", ["data.decoder.seed=4"])
    (outcome,) = ranks.run(1, train, run / "recipe.yaml", *overrides, "data.decoder.slow=0.001")
    assert outcome == "finished"


def test_what_metrics_need(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "shards", tmp_path / "shards")
    (tmp_path / "shards" / IMAGES).unlink()
    with pytest.raises(UserError, match=r"evaluation\.real_images: is missing"):
        distgan.evaluate(run / "run", [f"data.path={tmp_path / 'shards'}"])
    with pytest.raises(UserError, match=r"found latents, expected shards of images"):
        distgan.evaluate(run / "run", [f"evaluation.real_images={run / 'shards'}"])
    without = ["data.decoder=null"]
    with pytest.raises(UserError, match=r"latents .* have none by default"):
        distgan.load_config(run / "recipe.yaml", without)
    with pytest.raises(UserError, match=r"evaluation\.real_images: has no effect without data\.decoder"):
        distgan.load_config(run / "recipe.yaml", [*without, "evaluation.every=0", "evaluation.real_images=x"])
    with pytest.raises(UserError, match=r"which are of images, .* set data\.decoder to decode them"):
        distgan.load_config(run / "recipe.yaml", [*without, "evaluation.metrics=[fid]"])
