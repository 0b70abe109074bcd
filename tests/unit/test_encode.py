"""Encoding shards: what is written for which images, by any number of ranks, after kills, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distgan.autoencoders.decoding import IMAGES
from distgan.autoencoders.encoding import PLAN, encode
from distgan.autoencoders.loading import load_autoencoder
from distgan.cli import main
from distgan.config import AutoencoderConfig, DataConfig
from distgan.config.autoencoder import parse_autoencoder
from distgan.data.index.loading import load_index
from distgan.data.kinds.latents import DecodeLatent
from distgan.data.reader import read_samples
from distgan.errors import UserError
from distgan.inference.generation import from_bytes
from tests.latents import LinearAutoencoder
from tests.ranks import Job, RankPool
from tests.runs import wait_until
from tests.shards import damage, held, refusal
from tests.sources import digests

LINEAR = "tests.latents:LinearAutoencoder"


def run(shards: Path, dest: Path, encoder: str = LINEAR, *options: str, **settings: Any) -> dict[str, str]:
    """Encode, and return the digests of what was written."""
    section = parse_autoencoder(encoder, options)
    encode(str(shards), dest, section, **{"resolution": 16, "channels": 1, "batch_size": 64, **settings})
    return digests(dest)


@pytest.fixture(scope="module")
def encoded(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents of the digits, with flips."""
    dest = tmp_path_factory.mktemp("encoded") / "latents"
    run(digits, dest, flips=True)
    return dest


def moments_of(folder: Path, numbers: list[int], **data: Any) -> torch.Tensor:
    config = DataConfig(kind="latents", path="unused", channels=4, resolution=8, **data)
    return read_samples(config, load_index(str(folder)), numbers).data


def test_each_image_has_its_moments_and_label(digits: Path, encoded: Path) -> None:
    images, latents = load_index(str(digits)), load_index(str(encoded))
    assert [shard.count for shard in latents.shards] == [shard.count for shard in images.shards]
    assert latents.labels.tolist() == images.labels.tolist()
    assert latents.class_names == images.class_names
    numbers = [0, 499, 500, 1796]
    assert [latents.key(number) for number in numbers] == [f"{number:09d}" for number in numbers]
    pixels = read_samples(DataConfig(path="unused", resolution=16, channels=1), images, numbers).data
    expected = LinearAutoencoder().encode(from_bytes(pixels))
    torch.testing.assert_close(moments_of(encoded, numbers), expected)


def test_flips_are_those_of_the_mirror_images(digits: Path, encoded: Path) -> None:
    index = load_index(str(encoded))
    assert index.latents is not None
    assert index.latents.flipped
    pixels = read_samples(DataConfig(path="unused", resolution=16, channels=1), load_index(str(digits)), [7]).data
    decode = DecodeLatent(index.latents, mirrored=True)
    out = np.empty((8, 8, 8), np.float32)
    shard, offset, size, *_ = index.entry(7)
    decode(out, Path(index.shards[shard].url).read_bytes()[offset : offset + size], "moments.npy")
    expected = LinearAutoencoder().encode(from_bytes(pixels).flip(-1))[0]
    torch.testing.assert_close(torch.from_numpy(out), expected)


def test_shift_and_scale_are_measured_or_given(digits: Path, encoded: Path, tmp_path: Path) -> None:
    latents = load_index(str(encoded)).latents
    assert latents is not None
    images = read_samples(DataConfig(path="unused", resolution=16, channels=1), load_index(str(digits)), range(1797))
    pixels = from_bytes(images.data)
    means = torch.cat([LinearAutoencoder().encode(p)[:, :4] for p in (pixels, pixels.flip(-1))]).double()
    np.testing.assert_allclose(latents.shift, means.mean((0, 2, 3)), rtol=1e-5)
    variance = means.var((0, 2, 3), correction=0) + 0.5**2
    np.testing.assert_allclose(latents.scale, variance**-0.5, rtol=1e-5)
    run(digits, tmp_path / "given", shift=[0.0], scale=[0.18215])
    given = load_index(str(tmp_path / "given")).latents
    assert given is not None
    assert (given.shift, given.scale) == ((0.0,) * 4, (0.18215,) * 4)


def test_half_precision_rounds(digits: Path, encoded: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "half", float16=True)
    half, whole = (moments_of(folder, [3, 900]) for folder in (tmp_path / "half", encoded))
    assert torch.equal(half, whole.half().float())


def test_images_are_stored_as_they_are(digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "both", images=True)
    latents, images = (load_index(str(tmp_path / "both" / name)) for name in ("index.safetensors", IMAGES))
    assert (latents.kind, images.kind) == ("latents", "images")
    assert images.labels.tolist() == latents.labels.tolist()
    assert images.class_names == latents.class_names
    assert list(held(images).values()) == list(held(load_index(str(digits))).values())


def test_two_ranks_write_the_same_shards(digits: Path, encoded: Path, tmp_path: Path, ranks: RankPool) -> None:
    ranks.run(2, run, digits, tmp_path / "two", flips=True)
    assert digests(tmp_path / "two") == digests(encoded)


def test_a_killed_encode_goes_on_with_the_missing_shards(digits: Path, encoded: Path, tmp_path: Path) -> None:
    dest = tmp_path / "killed"
    command = [
        "encode", str(digits), str(dest), "--encoder", LINEAR, "slow=0.02", "--resolution", "16", "--channels", "1",
        "--flips", "--batch-size", "64",
    ]  # fmt: skip
    job = Job(1, command)
    wait_until(lambda: (dest / "shard-000000.tar").exists() and any(dest.glob(".encode-*-*")), job)
    job.kill()
    assert not (dest / "index.safetensors").exists()
    kept = (dest / "shard-000000.tar").stat().st_ino
    main(command)
    assert (dest / "shard-000000.tar").stat().st_ino == kept
    assert digests(dest) | {PLAN: ""} == digests(encoded) | {PLAN: ""}  # which has the option


def test_unreadable_images_are_left_out_and_counted(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "images")
    damage(load_index(str(tmp_path / "images")), 5)
    section = parse_autoencoder(LINEAR, [])
    done = encode(str(tmp_path / "images"), tmp_path / "latents", section, resolution=16, channels=1)
    assert len(done.index) == 1796
    assert "000000005" not in [done.index.key(sample) for sample in range(10)]
    assert any("1 image that cannot be read" in note for note in done.notes)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"resolution": 8}, "resolution: found 16, now 8"),
        ({"flips": False}, "flips: found True, now False"),
        ({"options": ("seed=4",)}, "encoder: found"),
        ({"options": ("deviation=0.1",)}, "options: found"),
    ],
)
def test_other_settings_do_not_go_on(digits: Path, encoded: Path, changed: dict[str, Any], said: str) -> None:
    options = changed.pop("options", ())
    with pytest.raises(UserError, match=said):
        run(digits, encoded, LINEAR, *options, **{"flips": True, **changed})


def test_other_folders_and_shards_are_refused(digits: Path, encoded: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="the folder is not empty"):
        run(digits, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="found latents, expected shards of images"):
        run(encoded, tmp_path / "again")
    with pytest.raises(UserError, match="--resolution 2 "):
        run(digits, tmp_path / "again", resolution=2)
    assert json.loads((encoded / PLAN).read_text())["resolution"] == 16


class _NoDecoder(nn.Module):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images


class Odd(LinearAutoencoder):
    """Its channels cannot be means and variances."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images)[:, :7]


class Infinite(LinearAutoencoder):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images) * math.inf


class Failing(LinearAutoencoder):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("_NoDecoder", "expected a torch.nn.Module with the methods `encode` and `decode`"),
        ("Odd", "encode returned 7 channels"),
        ("Infinite", "not finite"),
        ("Failing", "encode failed: .*no such luck"),
    ],
)
def test_encoders_that_break_the_contract(digits: Path, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(digits, tmp_path / "latents", f"{__name__}:{name}")


def test_what_names_no_encoder() -> None:
    assert "did you mean 'deviation'?" in refusal(parse_autoencoder, LINEAR, ["deviatoin=3"])
    assert "config.json" in refusal(load_autoencoder, AutoencoderConfig.model_validate("/nowhere"))
    assert "there is no module" in refusal(parse_autoencoder, "no_such_package.vae:Model", [])


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    """Seeded random weights in the library's own class; what it computes is compared with it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2,
        layers_per_block=1,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    section = AutoencoderConfig.model_validate(str(tmp_path / "vae"))
    loaded = load_autoencoder(section)
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = model.encode(images).latent_dist
        mean, log_variance = loaded.encode(images).chunk(2, dim=1)
        torch.testing.assert_close(mean, expected.mean)
        torch.testing.assert_close(log_variance, expected.logvar)
        torch.testing.assert_close(loaded.decode(mean), model.decode(expected.mean).sample)
    assert load_autoencoder(section).hash == loaded.hash
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    assert load_autoencoder(AutoencoderConfig.model_validate(str(tmp_path / "other"))).hash != loaded.hash
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "found _class_name 'UNet2DModel'" in refusal(load_autoencoder, section)
