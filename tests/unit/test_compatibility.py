"""Whether a run can go on from a checkpoint: the batch that statistics are over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distgan.checkpoint.compatibility import check_controller, validate_resume
from distgan.checkpoint.contents import Description
from distgan.config import Config, parse_config
from distgan.errors import UserError
from distgan.schedule import statistics_sizes

INDEX: Any = SimpleNamespace(fingerprint="f", vocabulary=None, latents=None)


def config(**sections: Any) -> Config:
    """A config without batch statistics but for those of `sections`; its micro-batch is 8."""
    values = {
        "run_dir": "unused",
        "data": {"path": "unused", "resolution": 16, "channels": 1},
        "generator": {"normalization": "none"},
        "discriminator": {"normalization": "none"},
        "training": {"steps": 10, "batch_size": 16, "gradient_accumulation_steps": 2},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if name in values else section  # type: ignore[dict-item]
    return parse_config(values)


SYNCHRONIZED = config(generator={"normalization": "synchronized"})
BY_RANK = config(generator={"normalization": "batch"})
COMPARED_BY_RANK = config(discriminator={"normalization": "none", "minibatch_discrimination": {"over": "rank"}})


def check(
    then: Config,
    world_then: int,
    now: Config,
    world_now: int,
    accept: frozenset[str] = frozenset(),
    teachers: tuple[str | None, str | None] = (None, None),
) -> None:
    description = Description(
        step=0,
        position=0,
        images=0,
        best=None,
        substitutions=[],
        data={"fingerprint": "f", "samples": 100},  # type: ignore[arg-type]
        classes=None,
        world_size=world_then,
        statistics={},
        config=then.model_dump(mode="json"),
        versions={},
        teacher=teachers[0],
    )
    validate_resume(Path("checkpoint"), description, now, INDEX, world_now, accept, teacher=teachers[1])


def test_other_weights_of_the_alignment_are_refused() -> None:
    same = config()
    with pytest.raises(UserError, match=r"network of hash abc, .*objective\.alignment\.weights is abd, .*restore it"):
        check(same, 1, same, 1, teachers=("abc", "abd"))
    for teachers in (("abc", "abc"), (None, "abc"), ("abc", None)):
        check(same, 1, same, 1, teachers=teachers)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (config(training={"batch_size": 64}), r"training\.batch_size: checkpoint 16, now 64 \("),
        (config(training={"critic_steps": 5}), r"training\.critic_steps: checkpoint 1, now 5 \("),
        (config(training={"initial_critic_steps": 9}), r"training\.initial_critic_steps: checkpoint 0, now 9 \("),
        (
            config(training={"extra_critic_steps": {"first": 3, "updates": 7}}),
            r"training\.extra_critic_steps\.updates: checkpoint null, now 7, .*first: checkpoint null, now 3",
        ),
        (
            config(objective={"adversarial": "relativistic_paired"}),
            r"objective\.adversarial: checkpoint non_saturating, now relativistic_paired \(.* 0 to 32 .* of 0 to 16",
        ),
    ],
)
def test_another_batch_is_named_by_its_key(now: Config, told: str) -> None:
    with pytest.raises(UserError, match=rf"{told}.*--accept batch") as caught:
        check(config(), 1, now, 1)
    assert "gradient_accumulation_steps" not in str(caught.value)
    check(config(), 1, now, 1, frozenset({"batch", "statistics"}))


def test_other_reals_of_the_generator_are_named_by_their_key() -> None:
    then, now = (
        config(objective={"adversarial": "relativistic_paired"}, training={"generator_reals": reals})
        for reals in ("own", "last")
    )
    with pytest.raises(UserError, match=r"training\.generator_reals: checkpoint own, now last \(.*--accept batch"):
        check(then, 1, now, 1)
    check(then, 1, now, 1, frozenset({"batch"}))
    # Without a loss that looks at reals the key decides nothing.
    check(config(), 1, config(training={"generator_reals": "last"}), 1)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, {}),
        ({"generator": {"normalization": "layer"}}, {}),
        ({"generator": {"normalization": "synchronized"}}, {"generator.normalization": 8}),
        ({"discriminator": {"normalization": "batch"}}, {"discriminator.normalization": 2}),
        (
            {"discriminator": {"normalization": "none", "minibatch_discrimination": {}}},
            {"discriminator.minibatch_discrimination": 8},
        ),
        (
            {"discriminator": {"normalization": "none", "minibatch_discrimination": {"over": "rank"}}},
            {"discriminator.minibatch_discrimination": 2},
        ),
        (
            {"discriminator": {"normalization": "none", "minibatch_stddev": {}}},
            {"discriminator.minibatch_stddev": 8},
        ),
        ({"objective": {"feature_matching": {}}}, {"objective.feature_matching": 8}),
        ({"objective": {"adversarial": "relativistic_average"}}, {"objective.adversarial": 8}),
        ({"objective": {"adversarial": "relativistic_paired"}}, {}),
    ],
)
def test_what_batch_statistics_are_over_on_four_ranks(sections: dict[str, Any], expected: dict[str, int]) -> None:
    chosen = config(**sections)
    sizes = [statistics_sizes(chosen, images=0, world_size=4, player=role) for role in ("discriminator", "generator")]
    assert sizes[0] | sizes[1] == expected
    assert all(sizes[1][key] == size for key, size in sizes[0].items() if key in sizes[1])


def test_a_generators_batch_has_statistics_of_its_own() -> None:
    """Its micro-batch is 24 of 48, and the discriminator's 8 of 16."""
    chosen = config(
        generator={"normalization": "synchronized"}, training={"generator_batch_size": 48},
        objective={"feature_matching": {}, "gradient_penalty": {"points": "uniform"}},
    )  # fmt: skip
    assert statistics_sizes(chosen, 0, 2, "discriminator") == {
        "generator.normalization": 8, "objective.gradient_penalty": 8
    }  # fmt: skip
    assert statistics_sizes(chosen, 0, 2, "generator") == {
        "generator.normalization": 24, "objective.feature_matching": 24
    }  # fmt: skip
    then = config(generator={"normalization": "synchronized"})
    now = config(generator={"normalization": "synchronized"}, training={"generator_batch_size": 48})
    told = r"training\.generator_batch_size: checkpoint null, now 48 \(.* 48 latents instead of 16\); .*--accept batch"
    with pytest.raises(UserError, match=told):
        check(then, 1, now, 1)
    with pytest.raises(UserError, match=r"over 8 samples .* of the generator, .* over 24, .*--accept statistics"):
        check(then, 1, now, 1, frozenset({"batch"}))
    check(then, 1, now, 1, frozenset({"batch", "statistics"}))
    check(then, 1, config(generator={"normalization": "synchronized"}, training={"generator_batch_size": 16}), 1)


@pytest.mark.parametrize(
    ("then", "world_then", "now", "world_now", "key"),
    [
        (BY_RANK, 2, BY_RANK, 4, "generator.normalization"),
        (COMPARED_BY_RANK, 4, COMPARED_BY_RANK, 1, "discriminator.minibatch_discrimination"),
        (SYNCHRONIZED, 2, BY_RANK, 2, "generator.normalization"),
        (BY_RANK, 4, SYNCHRONIZED, 4, "generator.normalization"),
    ],
    ids=["other ranks", "other ranks compared", "to each rank's own", "to all ranks'"],
)
def test_other_batch_statistics_are_to_be_accepted(
    then: Config, world_then: int, now: Config, world_now: int, key: str
) -> None:
    with pytest.raises(UserError, match=rf"{key}.*--accept statistics"):
        check(then, world_then, now, world_now)
    check(then, world_then, now, world_now, frozenset({"statistics"}))


@pytest.mark.parametrize(
    ("then", "world_then", "now", "world_now"),
    [
        (SYNCHRONIZED, 2, SYNCHRONIZED, 4),
        (BY_RANK, 1, SYNCHRONIZED, 4),
        (BY_RANK, 4, BY_RANK, 4),
        (config(), 1, config(training={"gradient_accumulation_steps": 4}), 2),
    ],
    ids=["synchronized", "the same in other words", "as many ranks", "none"],
)
def test_the_same_batch_statistics_are_no_change(then: Config, world_then: int, now: Config, world_now: int) -> None:
    check(then, world_then, now, world_now)


CONTROLLER = {"controller/probability": 0.25, "controller/signs": -12.0, "controller/images": 16.0}


def test_the_state_of_an_adaptive_augmentation_is_complete_or_absent() -> None:
    for saved in ({}, CONTROLLER):
        check_controller(Path("checkpoint"), {name: torch.tensor(value) for name, value in saved.items()})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"probability": None}, "controller/probability: found missing, expected a number"),
        ({"signs": [1.0]}, "controller/signs: found a list, expected a number"),
        ({"images": float("inf")}, "controller/images: found inf, expected a number"),
        ({"probability": 1.5}, "found probability 1.5 and"),
        ({"probability": -0.1}, "found probability -0.1 and"),
        ({"signs": 17.0}, "signs that sum to 17 of 16 images"),
        ({"images": -1.0, "signs": 0.0}, "signs that sum to 0 of -1 images"),
    ],
)
def test_a_state_of_an_adaptive_augmentation_that_cannot_be_is_refused(change: dict[str, Any], told: str) -> None:
    values = CONTROLLER | {f"controller/{name}": value for name, value in change.items()}
    saved = {name: torch.tensor(value) for name, value in values.items() if value is not None}
    with pytest.raises(UserError, match=f"checkpoint: counters: controller.*{told.removeprefix('controller')}"):
        check_controller(Path("checkpoint"), saved)
