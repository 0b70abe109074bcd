"""DiffAugment of latents against its released form (hse1032/GAT, losses/diffaug.py and losses/Rp_PT_loss.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from distgan.config import Config, parse_config
from distgan.errors import UserError
from distgan.losses.augmentation import AugmentationDraws
from distgan.losses.augmentation.latent_diffaugment import LatentDiffAugment
from distgan.losses.level_noise import noise_levels
from distgan.players.objective import DiscriminatorObjective
from distgan.players.samples import MicroBatch
from tests.configs import MINIMAL

CHANNELS, SIDE, BATCH, STEP = 4, 16, 12, 0.01


def draws_of(uniforms: Mapping[str, Sequence[float]], reference: Tensor | None = None) -> AugmentationDraws:
    """The same numbers for each sample."""
    return AugmentationDraws(
        uniform=lambda purpose, *shape: torch.tensor([uniforms[purpose]]) if shape else torch.zeros(1),
        normal=lambda *_: torch.zeros(0),
        probability=1.0,
        reference=reference,
    )


def augmented(samples: Tensor, name: str, *uniforms: float, reference: Tensor | None = None) -> Tensor:
    return LatentDiffAugment((name,))(samples, draws_of({name: uniforms}, reference))


def test_transforms_by_hand() -> None:
    latent, other = torch.randn(2, 1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for reference in (latent, other):
        gray, mean = reference.mean(1, keepdim=True), reference.mean()
        expected = ((latent + 0.25 - gray) * 0.5 + gray - mean) * 1.25 + mean
        given = None if reference is latent else other
        found = augmented(latent, "color", 0.75, 0.25, 0.75, 0.49, reference=given)
        torch.testing.assert_close(found, expected)
    assert torch.equal(augmented(latent, "color", 0.75, 0.25, 0.75, 0.51), latent), "half of the samples"

    found = augmented(latent, "translation", 0.99, 0.01, 0.0, 0.0)  # by 2 rows up and by 2 columns to the right
    assert torch.equal(found[:, :, :-2, 2:], latent[:, :, 2:, :-2])
    assert found[:, :, -2:].abs().max() == 0
    assert found[:, :, :, :2].abs().max() == 0

    hole = augmented(latent, "cutout", 8.5 / 17, 0.0, 0.0, 0.0) == 0
    expected_hole = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected_hole[4:12, 0:4] = True
    assert torch.equal(hole, expected_hole.expand_as(hole))

    assert torch.equal(augmented(latent, "flip", 0.39, 0.0, 0.0, 0.0), latent.flip(3))
    assert torch.equal(augmented(latent, "flip", 0.41, 0.0, 0.0, 0.0), latent)


def test_images_follow_shifts_and_flips_in_their_own_size() -> None:
    """An image whose blocks of 7x7 pixels show a latent shows it afterwards too: a shift by 2 is one by 14 pixels."""
    latent = torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    uniforms = {
        "color": (0.9, 0.9, 0.9, 0.0), "translation": (0.99, 0.3, 0.0, 0.0), "cutout": (0.5,) * 4, "flip": (0.0,) * 4,
    }  # fmt: skip
    pipe, geometry = LatentDiffAugment(), LatentDiffAugment(("translation", "flip"))
    image = latent.repeat_interleave(7, 2).repeat_interleave(7, 3)
    found = pipe.follow(image, draws_of(uniforms), latent.shape[2:])
    moved = geometry(latent, draws_of(uniforms))
    assert not torch.equal(moved, latent)
    assert torch.equal(found, moved.repeat_interleave(7, 2).repeat_interleave(7, 3))


class Recorder(nn.Module):
    """D(x) = mean of x, which keeps its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append(samples.detach())
        logits: Tensor = samples.mean((1, 2, 3)) + self.bias
        return logits


class Still(nn.Module):
    """G(z) = z, as the four levels of a latent."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents.view(-1, 4 * CHANNELS, SIDE, SIDE)


class OfStep(DiscriminatorObjective):
    """Finite differences along one given direction."""

    direction: float

    def _normal(self, purpose: str, batch: MicroBatch, like: Tensor) -> Tensor:
        if purpose.startswith("finite differences"):
            return torch.full_like(like, self.direction)
        return super()._normal(purpose, batch, like)


def config_of(*policy: str) -> Config:
    network = {"architecture": "gat"}
    differences = {"gamma": 2.0, "method": "finite_difference", "antithetic": False, "sigma": STEP}
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"kind": "latents", "path": "unused", "resolution": SIDE, "channels": CHANNELS},
            "generator": network,
            "discriminator": network,
            "objective": {
                "adversarial": "relativistic_paired", "r1": differences, "r2": differences,
                "augmentation": {"augmentation": "latent_diffaugment", "policy": list(policy)},
            },
            "training": {"steps": 1, "batch_size": BATCH},
        }
    )  # fmt: skip


def judged(direction: float, *policy: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs of the discriminator without the factors of level noise: reals, fakes and their perturbed copies
    (4, n, levels, C, H, W), and the scalars."""
    objective = OfStep(Recorder(), Still(), config_of(*policy), None)
    objective.direction = direction
    fixed = torch.Generator().manual_seed(1)
    levels = torch.randn(BATCH, 4, CHANNELS, SIDE, SIDE, generator=fixed, dtype=torch.float64)
    reals = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=fixed, dtype=torch.float64)
    batch = MicroBatch(torch.arange(BATCH), levels.flatten(1), None, reals, None)
    _, parts = objective(batch, 0, 0)
    [seen] = objective.network.seen  # type: ignore[union-attr]
    shares = torch.tensor(noise_levels(4), dtype=torch.float64).view(4, 1, 1, 1)
    return seen.unflatten(1, (4, CHANNELS)).unflatten(0, (4, BATCH)) / (1 - shares), parts  # type: ignore[operator]


def test_without_a_step_finite_differences_are_zero() -> None:
    _, parts = judged(0.0, "color", "translation", "cutout", "flip")
    assert parts["loss/r1"] == parts["loss/r2"] == 0


def test_levels_and_ends_share_draws_and_the_means_of_color() -> None:
    """Color maps the perturbed copy as the sample, so that a step of 1 in each element becomes one of its slope, the
    same in all levels; means of its own would give it 1."""
    seen, _ = judged(1.0, "color")
    for end, center in ((seen[2], seen[0]), (seen[3], seen[1])):
        slopes = ((end - center) / STEP).flatten(2)
        torch.testing.assert_close(slopes, slopes[:, :1, :1].expand_as(slopes), rtol=1e-6, atol=1e-6)
        found = slopes[:, 0, 0]
        unchanged = (found - 1).abs() < 1e-6
        assert 0 < unchanged.sum() < BATCH
        assert len(found[~unchanged].unique()) == BATCH - unchanged.sum()


@pytest.mark.parametrize("name", ["ada", "diffaugment"])
def test_augmentations_of_images_do_not_augment_latents(name: str) -> None:
    networks = {key: {"architecture": "gat"} for key in ("generator", "discriminator")}
    values = {**MINIMAL, "data": {"path": "d", "kind": "latents", "resolution": 8}, **networks}
    with pytest.raises(UserError, match=f"{name} does not augment latents.*no colors.*choose latent_diffaugment"):
        parse_config({**values, "objective": {"augmentation": name}})
