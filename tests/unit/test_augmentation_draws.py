"""What ADA and DiffAugment draw: each parameter's distribution, and samples that do not depend on their batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import Tensor

from distgan import randomness
from distgan.losses.augmentation import AugmentationDraws
from distgan.losses.augmentation.ada import Ada, Parameters
from distgan.losses.augmentation.diffaugment import DiffAugment
from distgan.losses.augmentation.latent_diffaugment import LatentDiffAugment
from tools import augmentations
from tools.bench.augmentation import released_operators

COUNT, SIDE = 10_000, 32
ALL = dict.fromkeys(("frequency_filter", "noise", "cutout"), 1.0)
PIPES = [Ada(**ALL), DiffAugment(), LatentDiffAugment()]


def draws_at(positions: Sequence[int] | Tensor, probability: float | Tensor, seed: int = 0) -> AugmentationDraws:
    places = torch.as_tensor(positions)
    return AugmentationDraws(
        uniform=lambda purpose, *shape: randomness.uniform(seed, f"test/{purpose}", places, shape),
        normal=lambda purpose, *shape: randomness.normal(seed, f"test/{purpose}", places, shape),
        probability=probability,
    )


def parameters(probability: float, **multipliers: float) -> Parameters:
    pipe = Ada(**{**ALL, **multipliers})
    return pipe.parameters(draws_at(torch.arange(COUNT), probability), height=SIDE, width=SIDE)


def flat(found: Parameters) -> dict[str, np.ndarray]:
    geometry, color, corruption = (part._asdict() for part in (found.geometry, found.color, found.corruption))
    bands = {f"band {number}": values for number, values in enumerate(found.bands.unbind(1))}
    return {f"{name}": values.double().numpy() for name, values in (geometry | color | bands).items()} | {
        f"corruption {name}": values.double().numpy() for name, values in corruption.items()
    }


def choices(values: Sequence[float]) -> Callable[[np.ndarray], float]:
    def compare(found: np.ndarray) -> float:
        counts = [int((found == value).sum()) for value in values]
        assert sum(counts) == len(found), "nothing else is drawn"
        return float(scipy.stats.chisquare(counts).pvalue)

    return compare


def distribution(name: str, *arguments: float, log2: bool = False) -> Callable[[np.ndarray], float]:
    def compare(found: np.ndarray) -> float:
        return float(scipy.stats.kstest(np.log2(found) if log2 else found, name, arguments).pvalue)

    return compare


def whole_shifts(found: np.ndarray) -> float:
    """round(U(-1/8, 1/8) 32) is -4 to 4, of which both ends are half as likely."""
    counts = [int((found == value).sum()) for value in range(-4, 5)]
    expected = len(found) * np.array([0.5, *[1.0] * 7, 0.5]) / 8
    return float(scipy.stats.chisquare(counts, expected).pvalue)


DISTRIBUTIONS: dict[str, Callable[[np.ndarray], float]] = {
    "flip": choices([0, 1]),
    "turns": choices([0, 1, 2, 3]),
    "whole_x": whole_shifts,
    "whole_y": whole_shifts,
    "scale": distribution("norm", 0, 0.2, log2=True),
    "first_angle": distribution("uniform", -math.pi, 2 * math.pi),
    "stretch": distribution("norm", 0, 0.2, log2=True),
    "second_angle": distribution("uniform", -math.pi, 2 * math.pi),
    "x": distribution("norm", 0, 0.125 * SIDE),
    "y": distribution("norm", 0, 0.125 * SIDE),
    "brightness": distribution("norm", 0, 0.2),
    "contrast": distribution("norm", 0, 0.5, log2=True),
    "luma_flip": choices([0, 1]),
    "hue": distribution("uniform", -math.pi, 2 * math.pi),
    "saturation": distribution("norm", 0, 1, log2=True),
    **{f"band {number}": distribution("norm", 0, 1, log2=True) for number in range(4)},
    "corruption noise": distribution("halfnorm", 0, 0.1),
    "corruption x": distribution("uniform"),
    "corruption y": distribution("uniform"),
}
NEUTRAL = dict.fromkeys(DISTRIBUTIONS, 0.0) | dict.fromkeys(
    ("scale", "stretch", "contrast", "saturation", *(f"band {number}" for number in range(4))), 1.0
)
APPLIED = flat(parameters(1.0))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_each_parameter_has_the_papers_distribution(name: str) -> None:
    """Of 10,000 draws, by a test that a right distribution fails once in 10,000 seeds; this seed is fixed."""
    assert DISTRIBUTIONS[name](APPLIED[name]) > 1e-4


def test_mean_and_spread_by_hand() -> None:
    for name, mean, spread in (
        ("scale", 0.0, 0.2), ("stretch", 0.0, 0.2), ("contrast", 0.0, 0.5), ("saturation", 0.0, 1.0),
    ):  # fmt: skip
        logs = np.log2(APPLIED[name])
        assert logs.mean() == pytest.approx(mean, abs=4 * spread / 100)
        assert logs.std() == pytest.approx(spread, rel=0.03)
    for name, spread in (("first_angle", math.pi / math.sqrt(3)), ("x", 4.0), ("brightness", 0.2)):
        assert APPLIED[name].mean() == pytest.approx(0, abs=4 * spread / 100)
        assert APPLIED[name].std() == pytest.approx(spread, rel=0.03)


def test_parameters_do_not_depend_on_each_other() -> None:
    names = list(DISTRIBUTIONS)
    table = np.corrcoef([scipy.stats.rankdata(APPLIED[name]) for name in names])
    assert np.abs(table - np.eye(len(names))).max() < 0.05


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.8])
def test_each_transform_is_applied_with_its_probability(probability: float) -> None:
    """A multiplier scales it. A flip has no effect half of the time, a turn a quarter, and so on. Of two rotations at
    least one is applied with the probability."""
    found = flat(parameters(probability, contrast=0.5))
    changed = {name: (found[name] != NEUTRAL[name]).mean() for name in DISTRIBUTIONS if not name.startswith("corr")}
    shares = {"flip": 1 / 2, "turns": 3 / 4, "luma_flip": 1 / 2, "whole_x": 7 / 8, "whole_y": 7 / 8, "contrast": 1 / 2}
    one_rotation = 1 - math.sqrt(1 - probability)
    for name, share in changed.items():
        expected = one_rotation if name.endswith("angle") else probability * shares.get(name, 1)
        assert share == pytest.approx(expected, abs=0.02), name
    rotated = (found["first_angle"] != 0) | (found["second_angle"] != 0)
    assert rotated.mean() == pytest.approx(probability, abs=0.02)
    assert ((found["x"] != 0) == (found["y"] != 0)).all(), "both directions, or none"
    assert found["corruption cutout"].mean() == pytest.approx(probability, abs=0.02)


def test_the_draws_of_a_transform_do_not_depend_on_the_others() -> None:
    alone = flat(parameters(1.0, flip=0.0, hue=0.0, noise=0.0))
    for name in set(DISTRIBUTIONS) - {"flip", "hue", "corruption noise"}:
        assert (alone[name] == APPLIED[name]).all(), name


def test_nothing_changes_at_probability_0() -> None:
    images = torch.randn(8, 3, SIDE, SIDE)
    for probability in (0.0, torch.zeros((), dtype=torch.float64)):
        assert (Ada(**ALL)(images, draws_at(range(8), probability)) - images).abs().max() < 1e-5
        assert torch.equal(DiffAugment()(images, draws_at(range(8), probability)), images)


@pytest.mark.parametrize("pipe", PIPES, ids=lambda pipe: type(pipe).__name__)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 16), (3, 20), (1, 4)])
def test_a_sample_alone_equals_the_sample_in_a_batch(
    pipe: Callable[[Tensor, AugmentationDraws], Tensor], channels: int, side: int
) -> None:
    """Bitwise: no padding and no sum depends on the other samples."""
    images = torch.randn(24, channels, side, side)
    whole = pipe(images, draws_at(range(24), 0.9))
    assert not torch.allclose(whole, images)
    for place in (0, 7, 23):
        alone = pipe(images[place : place + 1], draws_at([place], 0.9))
        assert torch.equal(alone[0], whole[place])
    halves = [pipe(images[part], draws_at(range(24)[part], 0.9)) for part in (slice(0, 12), slice(12, 24))]
    assert torch.equal(torch.cat(halves), whole)


def test_the_released_operators_give_the_same_images() -> None:
    """Padding by the batch's farthest transform, convolutions, and a matrix per image."""
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    draws = draws_at(range(16), 0.8)
    assert torch.allclose(Ada()(images, draws), released_operators(images, draws), atol=2e-4)


def test_the_pictures_of_the_page_are_of_these_transforms() -> None:
    for name, entries in augmentations.rows().items():
        found = np.asarray(Image.open(augmentations.FOLDER / f"{name}.png").convert("RGB"), dtype=float)
        drawn = np.asarray(augmentations.sheet(entries), dtype=float)
        assert found.shape == drawn.shape
        assert np.abs(found - drawn).mean() < 1, "run tools/augmentations.py"


@pytest.mark.parametrize("pipe", PIPES, ids=lambda pipe: type(pipe).__name__)
def test_gradients_of_the_whole_pipe(pipe: Callable[[Tensor, AugmentationDraws], Tensor]) -> None:
    images = torch.randn(3, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    draws = draws_at([3, 4, 5], 0.9)
    assert pipe(images, draws).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: pipe(x, draws), (images,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: pipe(x, draws).square(), (images,), fast_mode=True)


def diffaugment(images: Tensor, policy: str, uniforms: Sequence[float]) -> Tensor:
    """One policy with given numbers in place of those it draws."""
    draws = AugmentationDraws(
        uniform=lambda purpose, *shape: torch.tensor(uniforms).expand(len(images), -1) if shape else torch.zeros(1),
        normal=lambda *_: torch.zeros(0),
        probability=1.0,
    )
    return DiffAugment((policy,))(images, draws)


def test_diffaugment_by_hand() -> None:
    """Section 3.3 and the released code: brightness U(-1/2, 1/2), saturation U(0, 2), contrast U(1/2, 3/2), shifts by
    up to an eighth of the side, and a hole of half the side with its center anywhere."""
    image = torch.randn(1, 3, 16, 16)
    bright = image + 0.25
    gray = bright.mean(1, keepdim=True)
    saturated = gray + 0.5 * (bright - gray)
    expected = saturated.mean() + 1.25 * (saturated - saturated.mean())
    assert torch.allclose(diffaugment(image, "color", [0.75, 0.25, 0.75]), expected, atol=1e-6)
    assert torch.allclose(diffaugment(image, "color", [0.5, 0.5, 0.5]), image, atol=1e-6)

    shifted = diffaugment(image, "translation", [0.99, 0.01, 0])  # rows and columns, from -2 to 2
    assert torch.equal(shifted[:, :, :-2, 2:], image[:, :, 2:, :-2])
    assert shifted[:, :, -2:].abs().max() == 0
    assert shifted[:, :, :, :2].abs().max() == 0
    assert torch.equal(diffaugment(image, "translation", [0.5, 0.5, 0]), image)

    hole = diffaugment(image, "cutout", [8.5 / 17, 0.0, 0]) == 0  # centers 0 to 16, the hole from center - 4 on
    expected_hole = torch.zeros(16, 16, dtype=torch.bool)
    expected_hole[4:12, 0:4] = True
    assert torch.equal(hole, expected_hole.expand_as(hole))


def test_the_policys_order_counts() -> None:
    images = torch.randn(4, 3, 16, 16)
    one, other = (
        DiffAugment(policy)(images, draws_at(range(4), 1.0)) for policy in (("color", "cutout"), ("cutout", "color"))
    )
    assert (one == 0).sum() > (other == 0).sum(), "a hole that is cut first gets a color"


def test_diffaugment_leaves_samples_as_they_are_with_the_rest_of_the_probability() -> None:
    images = torch.randn(2000, 1, 4, 4)
    changed = (DiffAugment(("color",))(images, draws_at(range(2000), 0.3)) != images).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.04)
