"""Weights of penalties and terms that follow a schedule, against hand calculations with linear networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distgan import randomness, schedule
from distgan.config import Config, parse_config
from distgan.errors import UserError
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from tests.unit.test_objective import (
    COUNT,
    FAKES,
    REALS,
    SEED,
    STEPS,
    Bowl,
    Linear,
    W,
    batch,
    config_of,
    logit,
    slope_norm,
    softplus,
)

CURVE = {"start": 3.0, "end": 1.0, "shape": "cosine"}
VALUES = {0: 3.0, STEPS * COUNT // 4: 2.0 + math.cos(math.pi / 4), STEPS * COUNT // 2: 2.0, STEPS * COUNT: 1.0}
"""Images before the step -> value of the curve over a run of STEPS * COUNT images."""

_ALPHAS = randomness.uniform(SEED, "discriminator/interpolation", torch.arange(40, 40 + COUNT), ()).double().numpy()
_BETWEEN = _ALPHAS[:, None] * FAKES + (1 - _ALPHAS[:, None]) * REALS
ROWS = -2.0 * 0.5 + 1.0 * 0.25
"""Product of the two rows of the generator's matrix."""


@pytest.mark.parametrize(
    ("objective", "term"),
    [
        ({"drift": CURVE}, (logit(REALS) ** 2).mean()),
        ({"gradient_penalty": {"weight": CURVE}}, ((slope_norm(_BETWEEN) - 1) ** 2).mean()),
        (
            {"gradient_penalty": {"weight": CURVE, "target": 2, "every": 4}},
            4 * ((slope_norm(_BETWEEN) / 2 - 1) ** 2).mean(),
        ),
        ({"historical_averaging": {"discriminator": CURVE}}, 2 * 0.5**2),
    ],
    ids=["drift", "gradient penalty", "lazy gradient penalty", "history"],
)
def test_terms_of_the_discriminator(objective: dict[str, Any], term: float) -> None:
    for images, weight in VALUES.items():
        found = DiscriminatorObjective(Bowl(), Linear(), config_of(**objective), None)
        plain = DiscriminatorObjective(Bowl(), Linear(), config_of(), None)
        if "historical_averaging" in objective:
            assert found.history is not None
            for mean in found.history.state().values():
                mean += 0.5 * (mean.dim() > 0)  # each of the two weights is 0.5 from its average
        difference = found(batch(), images, 0)[0] - plain(batch(), images, 0)[0]
        assert difference.item() == pytest.approx(weight * term, rel=1e-6)


@pytest.mark.parametrize("name", ["r1", "r2", "gradient_penalty"])
def test_a_penalty_whose_weight_has_come_to_0_is_left_out(name: str) -> None:
    """It would cost a second derivative for nothing, and 0 times an infinite value is not 0."""
    curve = {"start": 1.0, "end": 0.0, "shape": "linear", "over": 0.1}
    config = config_of(**{name: {"weight" if name == "gradient_penalty" else "gamma": curve}})
    found = DiscriminatorObjective(Bowl(), Linear(), config, None)
    plain = DiscriminatorObjective(Bowl(), Linear(), config_of(), None)
    for images, is_due in ((0, True), (99, True), (100, False)):
        loss, parts = found(batch(), images, 0)
        assert (f"loss/{name}" in parts) == found.differentiates_twice(images, 0) == is_due
        assert torch.equal(loss, plain(batch(), images, 0)[0]) == (not is_due)


@pytest.mark.parametrize(
    ("objective", "term"),
    [
        (
            {"feature_matching": {"weight": CURVE, "adversarial": True}},
            (((REALS * W).mean(0) - (FAKES * W).mean(0)) ** 2).sum(),
        ),
        ({"historical_averaging": {"generator": CURVE}}, 4 * 0.5**2),
        ({"terms": [{"term": "orthogonal_regularization", "weight": CURVE, "every": 2}]}, ROWS**2 * 2),
    ],
    ids=["feature matching", "history", "extra term"],
)
def test_terms_of_the_generator(objective: dict[str, Any], term: float) -> None:
    for images, weight in VALUES.items():
        found = GeneratorObjective(Linear(), Bowl(), config_of(**objective), None)
        if "historical_averaging" in objective:
            assert found.history is not None
            for mean in found.history.state().values():
                mean += 0.5 * (mean.dim() > 0)
        loss, _ = found(batch(), images)
        assert loss.item() - softplus(-logit(FAKES)).mean() == pytest.approx(weight * term, rel=1e-6)


def test_the_weight_of_an_extra_term_may_change_its_sign() -> None:
    config = config_of(terms=[{"term": "orthogonal_regularization", "weight": {"start": -1, "end": 3}}])
    for images, weight in ((0, -1), (STEPS * COUNT // 4, 0), (STEPS * COUNT // 2, 1), (STEPS * COUNT, 3)):
        loss, parts = GeneratorObjective(Linear(), Bowl(), config, None)(batch(), images)
        assert loss.item() == pytest.approx(softplus(-logit(FAKES)).mean() + weight * ROWS**2)
        assert parts["loss/generator.orthogonal_regularization"].item() == pytest.approx(ROWS**2), "before its weight"


@pytest.mark.parametrize(("ends", "at_half"), [((0, 4), 2.0), ((4, 0), 2.0)])
def test_a_weight_of_zero_at_one_end_only_is_no_term_left_out(ends: tuple[float, float], at_half: float) -> None:
    curve = dict(zip(("start", "end"), ends, strict=True))
    config = config_of(drift=curve, historical_averaging={"discriminator": curve, "generator": curve})
    objective = DiscriminatorObjective(Bowl(), Linear(), config, None)
    assert objective.history is not None
    assert GeneratorObjective(Linear(), Bowl(), config, None).whole_weights == "objective.historical_averaging"
    for images, weight in ((0, ends[0]), (STEPS * COUNT // 2, at_half), (STEPS * COUNT, ends[1])):
        _, parts = objective(batch(), images, 0)
        assert parts["loss/drift"].item() == pytest.approx(weight * (logit(REALS) ** 2).mean())
        assert "loss/discriminator_history" in parts


KEYS = {
    "drift": "drift={}",
    "gradient_penalty.weight": "gradient_penalty={weight: {}}",
    "feature_matching.weight": "feature_matching={weight: {}}",
    "historical_averaging.generator": "historical_averaging={generator: {}}",
    "historical_averaging.discriminator": "historical_averaging={discriminator: {}}",
    "terms.0.weight": "terms=[{term: orthogonal_regularization, weight: {}}]",
    "alignment.weight": "alignment={weight: {}}",
}  # fmt: skip
"""Keys with the overrides that set them."""


def overridden(key: str, curve: str) -> Config:
    """A config in which a key of the objective has a curve."""
    override = f"objective.{KEYS[key]}".replace("{}", curve)
    return parse_config(config_of().model_dump(), [override])


@pytest.mark.parametrize("key", KEYS)
def test_each_weight_is_reported_and_its_mistakes_are_refused_in_one_line(key: str) -> None:
    found = dict(schedule.scheduled(overridden(key, "{start: 1, end: 0.5, over: 2}")))
    assert (found[f"objective.{key}"].start, found[f"objective.{key}"].over) == (1.0, 2.0)
    mistakes = {
        "{start: 1, end: 1}": f"objective.{key}.start: equals end",
        "{start: 1}": f"'objective.{key}.end' is missing",
        "{start: 1, end: 0, shape: cos}": f"objective.{key}.shape = 'cos'",
        "{start: 1, end: 0, until: 3}": f"unknown key 'objective.{key}.until'",
        "{start: -1, end: 0}": None if key.startswith("terms") else f"objective.{key} = -1.0: input should be greater",
        "often": f"objective.{key}",
    }
    for curve, expected in mistakes.items():
        if expected is None:
            overridden(key, curve)
            continue
        with pytest.raises(UserError) as raised:
            overridden(key, curve)
        assert expected in str(raised.value)
        assert "\n" not in str(raised.value)
