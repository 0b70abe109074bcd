"""Images beside latents on real ranks: each latent's own, mirrored as it is, and a run that ranks do not change."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distgan import schedule
from distgan.autoencoders.decoding import IMAGES
from distgan.autoencoders.encoding import encode
from distgan.checkpoint.contents import load_description
from distgan.config import DataConfig, load_config
from distgan.config.autoencoder import parse_autoencoder
from distgan.data.index.build import index_shards
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.data.order import make_order
from distgan.data.reader import read_samples
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.randomness import uniform
from distgan.training import loop
from distgan.training.inputs import Feed
from distgan.training.setup import assemble, validate_run
from tests.engines import LAUNCHED, under
from tests.ranks import RankPool
from tests.runs import differing, losses, recipe, tensors
from tests.shards import damage

BATCH, STEPS = 16, 3
NETWORK = {
    "architecture": "gat",
    "width": 16,
    "depth": 4,
    "heads": 2,
    "optimizer": {"learning_rate": 1e-2, "eps": 1e-2},
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Latents of the digits and of their mirror images, with the images beside them."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    encoder, sizes = parse_autoencoder("tests.latents:LinearAutoencoder", ()), {"resolution": 16, "channels": 1}
    encode(f"{digits}/*-00000[01].tar", folder, encoder, **sizes, batch_size=64, flips=True, images=True)
    return folder


class Pixels:
    """In DINOv2's place, which takes a rank seconds to import: tokens whose features are the colors of patches."""

    hash = "of no weights"

    @staticmethod
    def inputs(images: Tensor) -> Tensor:
        return images.float() / 255 - 0.5

    def __call__(self, inputs: Tensor) -> Tensor:
        patches = F.avg_pool2d(inputs, 14).flatten(2).mT.repeat(1, 1, 256)
        return torch.cat((patches.mean(1, keepdim=True), patches), dim=1)


def written(folder: Path, latents: Path) -> Path:
    return recipe(
        folder, latents,
        data={"kind": "latents", "channels": 4, "resolution": 8, "mirror": True},
        generator={**NETWORK, "latent_size": 4}, discriminator={**NETWORK, "projection_size": 8},
        objective={
            "r1": None, "adversarial": "relativistic_paired", "augmentation": "latent_diffaugment",
            "alignment": {"weights": "of pixels"},
        },
        training={"steps": 2, "batch_size": BATCH, "critic_steps": 1, "gradient_accumulation_steps": 2},
        monitoring={"every": 1},
    )  # fmt: skip


def fed(config_path: str) -> list[list[torch.Tensor]]:
    """Images of some steps' discriminator updates, and whether they are known, on this rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distgan.players.alignment.load_teacher", lambda _weights: Pixels())
        config, runtime = load_config(config_path), Runtime()
        state = assemble(config, load_index(config.data.path), runtime)
    found = []
    with closing(Feed(state, runtime)) as feed:
        for step in range(STEPS):
            for update in schedule.discriminator_updates(config, step, schedule.used_after(config, step)):
                for batch in feed.discriminator_inputs(update):
                    assert batch.images is not None
                    found.append([field.clone() for field in batch.images])
            assert all(batch.images is None for batch in feed.generator_inputs(step))
            state.progress.position += 2 * BATCH
            feed.share_failures()
    return found


def images_of(latents: Path, samples: np.ndarray, positions: np.ndarray, seed: int) -> torch.Tensor:
    data = DataConfig(path="unused", resolution=224)
    values = read_samples(data, load_index(str(latents / IMAGES)), samples).data
    mirrored = uniform(seed, "data/mirror", torch.from_numpy(positions)) < 0.5
    assert 0 < mirrored.sum() < len(mirrored)
    return torch.where(mirrored[:, None, None, None], values.flip(3), values)


def test_each_latent_has_its_image(tmp_path: Path, latents: Path, ranks: RankPool) -> None:
    path = written(tmp_path, latents)
    config, index = load_config(path), load_index(str(latents))
    # Steps have reals of the discriminator, then as many of the generator.
    positions = np.arange(STEPS * 2 * BATCH).reshape(STEPS, 2, BATCH)[:, 0].flatten()
    samples = make_order(config.data, config.seed, index).samples(positions)
    expected = images_of(latents, samples, positions, config.seed)
    for world_size in (1, 2):
        by_rank = ranks.run(world_size, fed, str(path))
        batches = [[torch.cat(parts) for parts in zip(*shares, strict=True)] for shares in zip(*by_rank, strict=True)]
        values, known = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(values, expected)
        assert known.all()


def test_an_image_that_cannot_be_read_is_not_aligned_with(tmp_path: Path, latents: Path, ranks: RankPool) -> None:
    """Nor is its sample used later on."""
    own = tmp_path / "latents"
    shutil.copytree(latents, own)
    path = written(tmp_path, own)
    config, index = load_config(path), load_index(str(own))
    bad = int(make_order(config.data, config.seed, index).samples(np.array([3]))[0])
    damage(load_index(str(own / IMAGES)), bad)
    [found] = ranks.run(1, fed, str(path))
    known = torch.cat([batch[1] for batch in found])
    assert known.nonzero().flatten().tolist() == [place for place in range(STEPS * BATCH) if place != 3]


def train(config: str, *changes: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distgan.players.alignment.load_teacher", lambda _weights: Pixels())
        loop.train(load_config(config, list(changes)))


def test_ranks_do_not_matter(tmp_path: Path, latents: Path, ranks: RankPool) -> None:
    config = str(written(tmp_path, latents))
    runs = {world_size: tmp_path / str(world_size) for world_size in (1, 2)}
    for world_size, run in runs.items():
        auto = ["training.gradient_accumulation_steps=auto"] if world_size == 2 else []  # tried on blank samples
        ranks.run(world_size, train, config, f"run_dir={run}", *auto)
    one, two = (tensors(run, 2) for run in runs.values())
    assert any("projector" in name for name in one)
    assert load_description(runs[2] / "checkpoints" / "step-00000002").teacher == Pixels.hash
    for name, value in one.items():
        if not name.endswith("average_styles"):  # which move once per micro-batch
            torch.testing.assert_close(two[name], value, rtol=2e-3, atol=2e-5, msg=name)
    for step in (1, 2):
        values: list[Any] = [losses(run)[step]["loss/alignment"] for run in runs.values()]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
        assert 0 < values[0] < 4, "two terms of 1 - cos"


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_resumes_bitwise(tmp_path: Path, latents: Path, ranks: RankPool, engine: str) -> None:
    config = str(written(tmp_path, latents))
    released = "training.generator_latents=last", "training.activation_checkpointing=true"
    for folder, lengths in (("whole", (2,)), ("halves", (1, 2))):
        for steps in lengths:
            changes = f"run_dir={tmp_path / folder}", f"training.steps={steps}", *released
            ranks.run(2, under, LAUNCHED[engine], train, config, *changes)
    assert differing(*(tensors(tmp_path / folder, 2) for folder in ("whole", "halves"))) == []


def test_latents_without_images_are_refused(tmp_path: Path, latents: Path) -> None:
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    config, index = load_config(written(tmp_path, folder)), load_index(str(folder))
    validate_run(config, index, 2)
    save_index(index_shards(str(folder / "*-000000.tar"), kind="images").index, folder / IMAGES)
    with pytest.raises(UserError, match=r"images\.safetensors: found images of other samples"):
        validate_run(config, index, 2)
    (folder / IMAGES).unlink()
    with pytest.raises(UserError, match=r"objective\.alignment: looks at the images of latents.*encode.*--images"):
        validate_run(config, index, 2)
