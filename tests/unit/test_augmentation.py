"""Augmentation in both players' objectives: what is augmented, where penalties are taken, and mistakes in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distgan import randomness
from distgan.config import AdversarialConfig, Config, ControllerConfig, parse_config
from distgan.errors import UserError
from distgan.losses.augmentation import AugmentationDraws
from distgan.losses.augmentation.controller import AugmentationController
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.samples import MicroBatch
from distgan.players.terms import TermView, build_loss
from tests.configs import MINIMAL

HERE = __name__
COUNT, SEED = 6, 3
W = torch.tensor([0.3, -1.1], dtype=torch.float64)


class Double:
    """x -> 2 x."""

    def __call__(self, samples: Tensor, draws: AugmentationDraws) -> Tensor:
        return 2 * samples


class Shift:
    """x -> x + u, one u for each sample and coordinate."""

    def __call__(self, samples: Tensor, draws: AugmentationDraws) -> Tensor:
        return samples + draws.uniform("shift", samples.shape[1])


class Reshaping:
    def __call__(self, samples: Tensor, draws: AugmentationDraws) -> Tensor:
        return samples[:, :1]


class Detaching:
    def __call__(self, samples: Tensor, draws: AugmentationDraws) -> Tensor:
        return samples.detach() + 1


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))


class JudgesTwice:
    """D of the fakes and of their negatives, in one pass of twice as many samples and in two passes."""

    seen: tuple[Tensor, Tensor]

    def __call__(self, view: TermView) -> Tensor:
        both = torch.cat((view.fakes, -view.fakes))
        JudgesTwice.seen = view.judge(both), torch.cat((view.judge(view.fakes), view.judge(-view.fakes)))
        return view.fakes.mean()


class JudgesOne:
    def __call__(self, view: TermView) -> Tensor:
        return view.judge(view.fakes[:1]).mean() + view.judge(view.fakes[:-1]).mean()


class Linear(nn.Module):
    """D(x) = w . x, which keeps its inputs."""

    feature_layer = "features"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(W.clone())
        self.features = nn.Identity()
        self.seen: list[Tensor] = []

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append(samples.detach().clone())
        logits: Tensor = self.features(samples) @ self.weight
        return logits


class Echo(nn.Module):
    """G(z) = s z with s = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.scale * latents


def config_of(augmentation: Any, **objective: Any) -> Config:
    network = {"architecture": "mlp", "normalization": "none"}
    return parse_config(
        {
            "run_dir": "unused",
            "seed": SEED,
            "data": {"kind": "points", "path": "unused"},
            "generator": network,
            "discriminator": network,
            "objective": {"augmentation": augmentation, **objective},
            "training": {"steps": 10, "batch_size": COUNT},
        },
        trust=True,
    )


def batch(start: int = 40) -> MicroBatch:
    fixed = torch.Generator().manual_seed(1)
    latents, reals = (torch.randn(COUNT, 2, generator=fixed, dtype=torch.float64) for _ in range(2))
    return MicroBatch(torch.arange(start, start + COUNT), latents, None, reals, None)


REALS, FAKES = batch().reals, batch().latents
assert REALS is not None


def of(role: str, augmentation: Any, **objective: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor], Echo]:
    """Loss and scalars of a player, and what the discriminator saw."""
    discriminator, generator = Linear(), Echo()
    config = config_of(augmentation, **objective)
    if role == "discriminator":
        loss, parts = DiscriminatorObjective(discriminator, generator, config, None)(batch(), 0, 0)
    else:
        loss, parts = GeneratorObjective(generator, discriminator, config, None)(batch(), 0)
    # Reals and fakes may share a pass.
    return loss, parts, list(torch.cat(discriminator.seen).split(len(REALS))), generator


@pytest.mark.parametrize(("penalties", "slope"), [("clean", 2.0), ("augmented", 1.0)])
def test_penalties_are_at_the_samples_that_the_config_says(penalties: str, slope: float) -> None:
    """With D(x) = w . x and x -> 2 x, the gradient at clean samples is 2 w, and at augmented ones w."""
    section = {"augmentation": f"{HERE}:Double", "penalties": penalties}
    square = slope**2 * W.square().sum().item()
    _, parts, seen, _ = of("discriminator", section, r1={"gamma": 3.0}, r2={"gamma": 5.0})
    assert parts["loss/r1"].item() == pytest.approx(3.0 / 2 * square)
    assert parts["loss/r2"].item() == pytest.approx(5.0 / 2 * square)
    assert all(torch.equal(found, 2 * given) for found, given in zip(seen, (REALS, FAKES), strict=True))
    _, parts, seen, _ = of("discriminator", section, adversarial="wasserstein", gradient_penalty={"weight": 1.0})
    assert parts["loss/gradient_penalty"].item() == pytest.approx((square**0.5 - 1) ** 2)
    fractions = randomness.uniform(SEED, "discriminator/interpolation", batch().addresses).double()[:, None]
    assert torch.allclose(seen[2], 2 * (REALS + fractions * (FAKES - REALS))), "augmented once in both"


def test_a_penalty_trains_the_discriminator_through_the_augmentation() -> None:
    """d/dw gamma/2 |2 w|^2 = 4 gamma w; the adversarial part of this batch is left out."""
    discriminator = Linear()
    config = config_of(f"{HERE}:Double", r1={"gamma": 3.0})
    loss, _ = DiscriminatorObjective(discriminator, Echo(), config, None)(batch(), 0, 0)
    adversarial, _ = DiscriminatorObjective(discriminator, Echo(), config_of(f"{HERE}:Double"), None)(batch(), 0, 0)
    (gradient,) = torch.autograd.grad(loss - adversarial, discriminator.weight)
    assert torch.allclose(gradient, 4 * 3.0 * W)


@pytest.mark.parametrize("role", ["discriminator", "generator"])
def test_reals_and_fakes_have_draws_of_their_own(role: str) -> None:
    _, _, (first, second), _ = of(role, f"{HERE}:Shift", adversarial="relativistic_paired")
    real, fake = (first, second) if role == "discriminator" else (second, first)
    for found, given, kind in ((real, REALS, "real"), (fake, FAKES, "fake")):
        drawn = randomness.uniform(SEED, f"{role}/augmentation of {kind}/shift", batch().addresses, (2,))
        assert torch.equal(found, given + drawn.double())
    assert not torch.allclose(real - REALS, fake - FAKES)


def test_the_generators_gradient_flows_through_the_augmentation() -> None:
    """-E log sigmoid(w . 2 s z): d/ds = -E (1 - sigmoid(w . 2 z)) w . 2 z."""
    loss, _, _, generator = of("generator", f"{HERE}:Double")
    logits = 2 * FAKES @ W
    expected = (-(1 - logits.sigmoid()) * logits).mean()
    (gradient,) = torch.autograd.grad(loss, generator.scale)
    assert gradient.item() == pytest.approx(expected.item())


def test_feature_matching_compares_augmented_samples() -> None:
    _, parts, _, _ = of("generator", f"{HERE}:Double", feature_matching={})
    expected = (2 * REALS.mean(0) - 2 * FAKES.mean(0)).square().sum()
    assert parts["loss/feature_matching"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("role", ["discriminator", "generator"])
def test_terms_judge_augmented_samples_with_the_same_draws_in_each_call(role: str) -> None:
    of(role, f"{HERE}:Shift", terms=[{"term": f"{HERE}:JudgesTwice", "player": role}])
    together, apart = JudgesTwice.seen
    assert torch.equal(together, apart)
    drawn = randomness.uniform(SEED, f"{role}/augmentation of extra terms/shift", batch().addresses, (2,)).double()
    assert torch.allclose(together[:COUNT], (FAKES + drawn) @ W)


def test_micro_batches_and_their_sizes_change_no_augmented_sample() -> None:
    whole = of("discriminator", f"{HERE}:Shift")[2]
    discriminator, config = Linear(), config_of(f"{HERE}:Shift")
    objective = DiscriminatorObjective(discriminator, Echo(), config, None)
    for part in (slice(0, 2), slice(2, 6)):
        micro = MicroBatch(*(None if value is None else value[part] for value in batch()))
        objective(micro, 0, 0)
    for kind, expected in enumerate(whole):
        assert torch.equal(torch.cat([samples.chunk(2)[kind] for samples in discriminator.seen]), expected)


def test_it_reports_its_probability_and_the_sign_of_reals() -> None:
    section = {"augmentation": f"{HERE}:Double", "probability": 0.25}
    _, parts, _, _ = of("discriminator", section)
    assert parts["augmentation/probability"].item() == 0.25
    assert parts["augmentation/sign"].item() == pytest.approx((REALS @ W).sign().mean().item())
    assert "augmentation/sign" not in of("discriminator", section, adversarial="relativistic_paired")[1]


def test_its_probability_follows_a_schedule_in_images() -> None:
    """R3GAN's: half a cosine from 0, over a thousand images here. It needs no sign of the logits."""
    schedule = {"start": 0.0, "end": 0.6, "over": 1.0, "shape": "cosine"}
    section = {"augmentation": f"{HERE}:Double", "probability": schedule}
    config = config_of(section, adversarial="relativistic_paired")
    objective = DiscriminatorObjective(Linear(), Echo(), config, None)
    for images, expected in ((0, 0.0), (500, 0.3), (1000, 0.6), (5000, 0.6)):
        _, parts = objective(batch(), images, 0)
        assert parts["augmentation/probability"].item() == pytest.approx(expected)


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("Reshaping", {}, r"Reshaping returned torch.float64 \(6, 1\), expected torch.float64 \(6, 2\)"),
    ("Detaching", {"r1": {"gamma": 1.0}}, "Detaching returned samples without a gradient"),
    ("Learned", {}, "Learned has parameters or buffers"),
    ("Double", {"terms": [{"term": f"{HERE}:JudgesOne", "player": "discriminator"}]}, "found 1 samples of a micro"),
]


@pytest.mark.parametrize(("name", "objective", "expected"), MISTAKES)
def test_mistakes_in_a_users_augmentation_are_one_line(name: str, objective: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        of("discriminator", f"{HERE}:{name}", **objective)
    assert "\n" not in str(caught.value)
    assert "objective.augmentation" in str(caught.value)


@pytest.mark.parametrize("family", ["relativistic_paired", "relativistic_average", "wasserstein", "least_squares"])
def test_adaptive_probabilities_need_logits_with_a_sign(family: str) -> None:
    """A constant that is added to all logits changes no relativistic or Wasserstein loss, but every sign. Least squares
    are undecided at 1/2."""
    if family != "least_squares":
        loss = build_loss(AdversarialConfig(family=family))
        real, fake = torch.randn(2, 8)
        assert torch.allclose(loss.discriminator(real + 5, fake + 5), loss.discriminator(real, fake), atol=1e-5)
    with pytest.raises(
        UserError, match=f"adaptive .* adversarial: {family} do not; set a number or a schedule, such as"
    ):
        parse_config({**MINIMAL, "objective": {"adversarial": family, "augmentation": "ada"}})
    fixed = {"augmentation": "ada", "probability": 0.3}
    parse_config({**MINIMAL, "objective": {"adversarial": family, "augmentation": fixed}})


class Signed:
    """A loss of a user's whose logits have a sign."""

    zero_is_boundary = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return -fake.mean()


class Unsigned(Signed):
    zero_is_boundary = False


def test_a_users_loss_says_whether_its_logits_have_a_sign() -> None:
    parse_config({**MINIMAL, "objective": {"adversarial": f"{HERE}:Signed", "augmentation": "ada"}}, trust=True)
    with pytest.raises(UserError, match="Unsigned do not; set a number or a schedule"):
        parse_config({**MINIMAL, "objective": {"adversarial": f"{HERE}:Unsigned", "augmentation": "ada"}}, trust=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"augmentation": {"augmentation": "ada", "probability": "often"}}, "expected adaptive or a number from 0 to 1"),
    ({"augmentation": {"augmentation": "ada", "probability": 1.5}}, "less than or equal to 1"),
    ({"augmentation": {"augmentation": "ada", "probability": {"start": 0, "end": 2}}}, "less than or equal to 1"),
    ({"augmentation": {"augmentation": "ada", "probability": {"from": 0, "end": 0.5}}}, "probability.*from"),
    ({"augmentation": {"augmentation": "ada", "policy": ["color"]}}, "no option of augmentation: ada, only of diff"),
    ({"augmentation": {"augmentation": "diffaugment", "policy": ["color", "color"]}}, "color is there twice"),
    ({"augmentation": {"augmentation": "diffaugment", "controller": {"target": 0.5}}}, "has no effect with prob"),
    ({"augmentation": {"augmentation": "diffaugment", "penalties": "augmented"}}, "has no effect without r1"),
    ({"augmentation": "adda"}, "did you mean ada"),
]


@pytest.mark.parametrize(("objective", "expected"), REFUSED)
def test_what_means_nothing_is_refused(objective: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_config({**MINIMAL, "objective": objective})


@pytest.mark.parametrize("kind", ["text", "points"])
def test_other_kinds_of_data_are_refused(kind: str) -> None:
    architecture = {"architecture": {"text": "characters", "points": "mlp"}[kind]}
    values = {**MINIMAL, "data": {"path": "d", "kind": kind}, "generator": architecture, "discriminator": architecture}
    with pytest.raises(UserError, match=f"ada does not augment {kind} .data.kind.; leave it out"):
        parse_config({**values, "objective": {"augmentation": "ada"}})


def controller(**values: Any) -> AugmentationController:
    return AugmentationController(ControllerConfig(**values), torch.device("cpu"))


def test_the_controller_follows_the_released_rule() -> None:
    """Every 4 batches of 64: p += sign(mean sign - 0.6) 4 64 / 500,000, from 0, clamped (training_loop.py of
    StyleGAN2-ADA)."""
    found, expected = controller(), 0.0
    signs = np.random.default_rng(0).choice([-1.0, 1.0], p=[0.2, 0.8], size=(200, 64))
    for interval in range(50):
        for index in range(4 * interval, 4 * interval + 4):
            assert found.probability.item() == pytest.approx(expected), "it changes with every fourth update"
            parts = [torch.tensor(half.mean(), dtype=torch.float32) for half in np.split(signs[index], 2)]
            found.update(parts, torch.ones(()), index=index, images=64)
        mean = signs[4 * interval : 4 * interval + 4].mean()
        expected = max(0.0, expected + np.sign(mean - 0.6) * 4 * 64 / 500_000)
    assert found.probability.item() == pytest.approx(expected, abs=1e-9)


def test_the_controller_ends_at_0_and_1_and_stands_at_its_target() -> None:
    found = controller(every=1, kimg=1.0)
    for index, (sign, expected) in enumerate([(1.0, 0.4), (1.0, 0.8), (1.0, 1.0), (-1.0, 0.6), (0.6, 0.6), (0.0, 0.2)]):
        found.update([torch.tensor(sign)], torch.ones(()), index=index, images=400)
        assert found.probability.item() == pytest.approx(expected)
    for index in range(6, 8):
        found.update([torch.tensor(-1.0)], torch.ones(()), index=index, images=400)
    assert found.probability.item() == 0.0


def test_skipped_updates_do_not_count() -> None:
    found = controller(every=2, kimg=1.0)
    found.update([torch.tensor(1.0)], torch.ones(()), index=0, images=100)
    found.update([torch.tensor(torch.nan)], torch.zeros(()), index=1, images=100)
    assert found.probability.item() == pytest.approx(0.1), "100 images of the one update that was applied"
    for index in (2, 3):
        found.update([torch.tensor(torch.nan)], torch.zeros(()), index=index, images=100)
    assert found.probability.item() == pytest.approx(0.1)
