"""Alignment of GAT's discriminator with DINOv2 against formulas written by hand (hse1032/GAT, losses/Rp_PT_loss.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distgan import randomness
from distgan.config import Config, parse_config
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import sample_shape
from distgan.players.objective import DiscriminatorObjective
from distgan.players.samples import MicroBatch, RealImages
from distgan.training.warnings import config_warnings
from tests.detectors import ALIGNED, save_aligned

pytest.importorskip("transformers")
from distgan.losses import dinov2

SIDE, CHANNELS, BATCH = 8, 4, 3
NETWORK = {"architecture": "gat", "width": 16, "depth": 4, "heads": 2}
PUBLISHED = dinov2.BASE_ARCHITECTURE
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, nn.Module]]:
    """Weights of the library's own network, and it with the positions of 224 pixels, which another test computes."""
    folder = tmp_path_factory.mktemp("dinov2")
    network = save_aligned(folder).eval()
    positions = network.embeddings.position_embeddings
    positions.data = dinov2.resampled(positions.data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2, "BASE_ARCHITECTURE", ALIGNED)
        yield folder, network


def config_of(weights: Path | str | None, kind: str = "latents", **objective: Any) -> Config:
    return parse_config(
        {
            "run_dir": "unused",
            "data": {
                "kind": kind,
                "path": "unused",
                "resolution": SIDE,
                "channels": CHANNELS if kind == "latents" else 1,
            },
            "generator": {**NETWORK, "latent_size": 6, "latent_distribution": "normal"},
            "discriminator": {**NETWORK, "projection_size": 8},
            "objective": {"alignment": {"weights": weights and str(weights), "weight": 0.5}, **objective},
            "training": {"steps": 1, "batch_size": BATCH},
        }
    )


def batch_of(known: list[bool] | None = None) -> MicroBatch:
    fixed = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), generator=fixed, dtype=torch.uint8)
    images = RealImages(pixels, torch.tensor(known or [True] * BATCH))
    reals = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=fixed)
    return MicroBatch(torch.arange(5, 5 + BATCH), torch.randn(BATCH, 6, generator=fixed), None, reals, None, images)


def objective_of(config: Config) -> DiscriminatorObjective:
    torch.manual_seed(0)
    shape = sample_shape(config.data, num_classes=0, shift=(0.0,) * CHANNELS, scale=(1.0,) * CHANNELS)
    generator, discriminator = (
        build_generator(config.generator, shape),
        build_discriminator(config.discriminator, shape),
    )
    return DiscriminatorObjective(discriminator, generator, config, None)


def found_in(objective: DiscriminatorObjective, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, its parts and what the projector made of the reals."""
    outputs: list[Tensor] = []
    projector = objective.network.get_submodule("projector")
    handle = projector.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output.detach()))
    loss, parts = objective(batch, 0, 0)
    handle.remove()
    return loss, parts, outputs[0]


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(-1) / np.sqrt((one * one).sum(-1) * (other * other).sum(-1))


def by_hand(projected: Tensor, pixels: np.ndarray, network: nn.Module) -> np.ndarray:
    """The loss of each sample: images (n, 3, 224, 224), normalized."""
    with torch.no_grad():
        tokens = network(pixel_values=torch.from_numpy(pixels).float()).last_hidden_state
    grid = tokens[:, 1:].mT.unflatten(2, (16, 16))
    patches = nn.functional.interpolate(grid, (4, 4), mode="bicubic", align_corners=False).flatten(2).mT
    ours, theirs = projected.double().numpy(), tokens.double().numpy()
    spatial = 1 - cosine(ours[:, 1:], patches.double().numpy())
    each: np.ndarray = 1 - cosine(ours[:, 0], theirs[:, 0]) + spatial.sum(1) / 16
    return each


def normalized(images: RealImages) -> np.ndarray:
    return (images.values.double().numpy() / 255 - MEAN[:, None, None]) / DEVIATION[:, None, None]


def test_the_term_is_the_formula(teacher: tuple[Path, nn.Module]) -> None:
    folder, network = teacher
    batch = batch_of()
    loss, parts, projected = found_in(objective_of(config_of(folder)), batch)
    assert projected.shape == (BATCH, 17, 768)
    assert batch.images is not None
    expected = by_hand(projected, normalized(batch.images), network)
    assert expected.std() > 1e-3
    assert parts["loss/alignment"].item() == pytest.approx(expected.mean(), rel=1e-4)
    assert loss.item() == pytest.approx((parts["loss/discriminator"] + 0.5 * parts["loss/alignment"]).item())
    curve = objective_of(config_of(folder, alignment={"weights": str(folder), "weight": {"start": 0, "end": 4}}))
    assert curve.length == BATCH
    for images, weight in ((0, 0.0), (1, 4 / BATCH), (BATCH, 4.0)):
        loss, parts = curve(batch, images, 0)
        assert loss.item() == pytest.approx((parts["loss/discriminator"] + weight * parts["loss/alignment"]).item())
    partly = batch_of([True, False, True])
    _, parts, projected = found_in(objective_of(config_of(folder)), partly)
    assert parts["loss/alignment"].item() == pytest.approx((expected[0] + expected[2]) / 3, rel=1e-4)


def test_images_move_with_their_latents(teacher: tuple[Path, nn.Module]) -> None:
    """Images get the latents' draws, and zeros after normalization where nothing was: 28 pixels for each element."""
    folder, network = teacher
    batch = batch_of()
    _, parts, projected = found_in(objective_of(config_of(folder, augmentation="latent_diffaugment")), batch)
    purpose = "discriminator/augmentation of real"
    shifts = randomness.uniform(0, f"{purpose}/translation", batch.addresses, (4,))
    flips = randomness.uniform(0, f"{purpose}/flip", batch.addresses, (4,))[:, 0] < 0.4
    assert batch.images is not None
    moved = np.zeros((BATCH, 3, 224, 224))
    for number, image in enumerate(normalized(batch.images)):
        down, right = (28 * (int(u * 3) - 1) for u in shifts[number, :2].tolist())
        for row in range(max(0, -down), min(224, 224 - down)):
            columns = np.arange(max(0, -right), min(224, 224 - right))
            moved[number][:, row, columns] = image[:, row + down, columns + right]
        if flips[number]:
            moved[number] = moved[number][..., ::-1]
    assert 0 < flips.sum() < BATCH
    assert (moved == 0).any()
    assert parts["loss/alignment"].item() == pytest.approx(by_hand(projected, moved, network).mean(), rel=1e-4)


def test_parts_of_a_batch_have_its_mean(teacher: tuple[Path, nn.Module]) -> None:
    objective, batch = objective_of(config_of(teacher[0], augmentation="latent_diffaugment")), batch_of()
    _, whole, _ = found_in(objective, batch)
    assert batch.reals is not None
    assert batch.images is not None
    found = []
    for part in (slice(0, 1), slice(1, 3)):
        images = RealImages(*(field[part] for field in batch.images))
        some = MicroBatch(batch.addresses[part], batch.latents[part], None, batch.reals[part], None, images)
        found += [found_in(objective, some)[1]["loss/alignment"]] * (part.stop - part.start)
    assert torch.stack(found).mean().item() == pytest.approx(whole["loss/alignment"].item(), rel=1e-5)


def test_it_trains_the_discriminator_and_not_the_teacher(teacher: tuple[Path, nn.Module]) -> None:
    objective = objective_of(config_of(teacher[0]))
    state = torch.get_rng_state()
    _, parts = objective(batch_of(), 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    loss, _ = objective(batch_of(), 0, 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in objective.network.parameters())
    assert parts["loss/alignment"] > 0
    assert all(name.startswith("network.") for name in objective.state_dict()), "nothing of the teacher is saved"


def test_images_are_their_own(teacher: tuple[Path, nn.Module]) -> None:
    """Runs on images align with the reals themselves: gray ones of 8 pixels are resized and repeated."""
    folder, network = teacher
    objective = objective_of(config_of(folder, "images"))
    levels = torch.randint(0, 256, (BATCH, 1, SIDE, SIDE), dtype=torch.uint8)
    batch = batch_of()._replace(reals=levels / 127.5 - 1, images=None)
    _, parts, projected = found_in(objective, batch)
    large = nn.functional.interpolate(levels.double() / 255, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (large.numpy() - MEAN[:, None, None]) / DEVIATION[:, None, None]
    assert parts["loss/alignment"].item() == pytest.approx(by_hand(projected, pixels, network).mean(), rel=1e-4)


def test_without_weights_it_is_left_out_and_said() -> None:
    config = config_of(None)
    assert config.discriminator.options.alignment_size is None
    [line] = [line for line in config_warnings(config) if "alignment" in line]
    assert line.startswith("objective.alignment.weights = null: ")
    assert "hf download facebook/dinov2-base" in line
    assert "loss/alignment" not in objective_of(config)(batch_of(), 0, 0)[1]


def test_the_teacher_is_the_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B/14 has 86,580,480 parameters with the positions of 518 pixels."""
    monkeypatch.setattr(dinov2, "load_weights", lambda *_: None)
    positions = {"embeddings.position_embeddings": torch.empty(1, 1370, 768, device="meta")}
    network = dinov2.dinov2_network(positions, PUBLISHED, dinov2.BASE)
    assert sum(part.numel() for part in network.parameters()) == 86_580_480 - (1370 - 257) * 768


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"discriminator": {"architecture": "r3gan"}, "generator": {"architecture": "r3gan"}},
         r"objective\.alignment: .*r3gan has no option alignment_size; choose gat"),
        ({"discriminator": {**NETWORK, "alignment_size": 512}}, r"discriminator\.alignment_size: 512: .*have 768"),
        ({"discriminator": {**NETWORK, "alignment_size": 768}, "objective": {}},
         r"discriminator\.alignment_size: 768 has no effect without objective\.alignment"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], expected: str) -> None:
    values = config_of("weights").model_dump()
    values["discriminator"].pop("alignment_size")
    with pytest.raises(UserError, match=expected):
        parse_config({**values, **changes})


def test_missing_weights_and_augmentations_that_are_not_followed(
    teacher: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"objective\.alignment\.weights = .*none: cannot read.*hf download"):
        objective_of(config_of(tmp_path / "none"))
    with pytest.raises(UserError, match=r"objective\.alignment: .*diffaugment has no method follow"):
        objective_of(config_of(teacher[0], "images", augmentation="diffaugment"))
