from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distgan import schedule
from distgan.config import Config, EMAConfig, OptimizerConfig, ScheduleConfig
from distgan.schedule import growth_warnings


def config(batch_size: int = 6, accumulation: int = 2, critic_steps: int = 3) -> Config:
    return Config.model_validate(
        {
            "run_dir": "r",
            "data": {"path": "d", "resolution": 32},
            "training": {
                "steps": 9,
                "batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "critic_steps": critic_steps,
            },
        }
    )


def test_updates_tile_the_stream() -> None:
    position, seen = 0, []
    for step in range(3):
        assert (position, position) == schedule.used_after(config(), step)
        for update in schedule.discriminator_updates(config(), step, schedule.Used(position, position)):
            seen.append((update.index, update.start, update.images))
        position = seen[-1][1] + 6
    assert seen == [(index, 6 * index, 6 * index) for index in range(9)]


def test_a_generators_own_reals_follow_those_of_its_step() -> None:
    """Three updates of 6, then 6 for the generator: positions advance by 24 a step, and images by 18."""
    values = config().model_dump() | {"objective": {"adversarial": "relativistic_paired"}}
    own = Config.model_validate(values)
    last = Config.model_validate(values | {"training": values["training"] | {"generator_reals": "last"}})
    assert own.generator_draws_reals
    assert not last.generator_draws_reals
    assert not config().generator_draws_reals, "its loss looks at no reals"
    starts = [
        (update.start, update.images)
        for step in range(2)
        for update in schedule.discriminator_updates(own, step, schedule.used_after(own, step))
    ]
    assert starts == [(0, 0), (6, 6), (12, 12), (24, 18), (30, 24), (36, 30)]
    assert schedule.used_after(own, 5) == (5 * 24, 5 * 18)
    assert schedule.used_after(last, 5) == (5 * 18, 5 * 18)
    assert schedule.run_images(own) == 9 * 18


def test_a_generators_batch_of_its_own() -> None:
    """Three updates of 6 and one of 10 in two micro-batches each, with reals for both players, and then without."""
    values = config().model_dump() | {"objective": {"adversarial": "relativistic_paired"}}
    values["training"] |= {"generator_batch_size": 10}
    own = Config.model_validate(values)
    assert schedule.used_after(own, 4) == (4 * 28, 4 * 18)
    assert next(schedule.discriminator_updates(own, 1, schedule.used_after(own, 1))).start == 28
    sizes = [3, 3, 3, 3, 3, 3, 5, 5]
    assert list(itertools.islice(schedule.stream_micro_batches(own, 2, 36), 16)) == sizes * 2
    assert [schedule.generator_slot(own, step) for step in range(3)] == [0, 10, 20]
    assert (own.micro_batch, own.generator_micro_batch, own.statistics_batch) == (3, 5, 5)
    unpaired = Config.model_validate(values | {"objective": {}})
    assert schedule.used_after(unpaired, 4) == (4 * 18, 4 * 18)
    assert list(itertools.islice(schedule.stream_micro_batches(unpaired, 0, 0), 16)) == [3] * 16


def growing(steps: int = 1000, **growth: Any) -> Config:
    network = {"architecture": "progressive", "normalization": "none"}
    return Config.model_validate(
        {
            "run_dir": "r",
            "data": {"path": "d", "resolution": 16},
            "generator": network,
            "discriminator": network,
            "training": {"steps": steps, "batch_size": 16, "critic_steps": 2},
            "growth": {"stable_kimg": 0.1, "fade_kimg": 0.2, **growth},
        }
    )


def test_growth_by_hand() -> None:
    """4x4 for 100 images, 8x8 faded in over 200, alone for 100, then the same for 16x16."""
    stages = {0: (0, 1), 99: (0, 1), 100: (0, 1), 101: (1, 1 / 200), 200: (1, 0.5), 299: (1, 199 / 200), 300: (1, 1)}
    stages |= {400: (1, 1), 401: (2, 1 / 200), 550: (2, 0.75), 600: (2, 1), 701: (2, 1), 10**12: (2, 1)}
    for position, (level, fade) in stages.items():
        assert schedule.growth(growing(), position) == schedule.Growth(level, fade)
    assert schedule.growth(config(), 500) is None


@given(st.integers(0, 2000), st.sampled_from([0.0, 0.03, 0.2]), st.sampled_from([0.0, 0.1]))
def test_growth_is_the_released_codes_level_of_detail(position: int, fade: float, stable: float) -> None:
    """karras/progressive_growing_of_gans, train.py: phases of training and then transition, counted down from the top.

    As float arithmetic can be off by an image there, it is done in thousandths.
    """
    if not fade + stable:
        return
    phase, within = divmod(position, round(1000 * (stable + fade)))
    detail = 2.0 - phase
    if fade:
        detail -= max(within - round(1000 * stable), 0) / (1000 * fade)
    elif within > 1000 * stable:
        detail -= 1
    detail = max(detail, 0.0)
    found = schedule.growth(growing(stable_kimg=stable, fade_kimg=fade), position)
    assert found is not None
    if fade:
        assert 2 - found.level + (1 - found.fade) == pytest.approx(detail)
        assert found.resolution == 2 ** (4 - math.floor(detail + 1e-9))
    assert 0 < found.fade <= 1


def test_growth_can_begin_higher() -> None:
    config = growing(first_resolution=8)
    assert [schedule.resolution(config, position) for position in (0, 100, 101, 10**6)] == [8, 8, 16, 16]
    assert schedule.growth(growing(first_resolution=16), 0) == schedule.Growth(2, 1.0)


def test_a_level_can_begin_at_once() -> None:
    config = growing(fade_kimg=0)
    assert [schedule.growth(config, position) for position in (100, 101, 201)] == [
        schedule.Growth(0, 1.0), schedule.Growth(1, 1.0), schedule.Growth(2, 1.0)
    ]  # fmt: skip


def test_batches_by_resolution() -> None:
    """A listed size holds from its resolution up; the paper's 16, then 14, 6 and 3."""
    config = growing(batch_sizes={8: 6})
    assert [schedule.batch_size(config, position) for position in (0, 100, 101, 10**6)] == [16, 16, 6, 6]
    config = growing(batch_sizes={4: 32, 16: 4})
    assert [schedule.batch_size(config, position) for position in (0, 101, 401)] == [32, 32, 4]
    assert schedule.largest_batch(config) == 32
    assert schedule.batch_size(growing(), 401) == 16


def test_steps_until_networks_are_whole() -> None:
    # Beyond 100 + 200 + 100 + 200 images there are no more fades; 19 steps of 32 images are 608.
    assert schedule.steps_to_grow(growing()) == 19
    assert schedule.steps_to_grow(growing(first_resolution=16)) == schedule.steps_to_grow(config()) == 0


def test_runs_that_end_too_early_are_doubted() -> None:
    assert growth_warnings(growing(steps=19)) == ()
    (line,) = growth_warnings(growing(steps=13))  # 416 images
    assert "training.steps = 13: the run ends at 16 pixels per side" in line
    assert "from step 19 on" in line
    assert growth_warnings(config()) == ()
    values = growing().model_dump()
    values["training"] |= {"steps": None, "kimg": 0.4}
    (line,) = growth_warnings(Config.model_validate(values))
    assert "training.kimg = 0.4: the run ends at 16 pixels per side" in line


@given(
    st.integers(0, 120),
    st.dictionaries(st.sampled_from([4, 8, 16]), st.integers(1, 40)),
    st.sampled_from([0, 3]),
    st.sampled_from([None, {"updates": 5, "first": 2, "every": 7}]),
    st.booleans(),
)
def test_positions_are_those_of_the_steps_one_by_one(
    steps: int, batch_sizes: dict[int, int], initial_critic_steps: int, extra: dict[str, int] | None, own: bool
) -> None:
    config = growing(batch_sizes=batch_sizes)
    training = config.training.model_dump() | {
        "initial_critic_steps": initial_critic_steps,
        "extra_critic_steps": extra,
    }
    objective = {"feature_matching": {}} if own else {}
    config = Config.model_validate(config.model_dump() | {"training": training, "objective": objective})
    position = images = 0
    for step in range(steps):
        updates = list(schedule.discriminator_updates(config, step, schedule.Used(position, images)))
        assert {update.batch_size for update in updates} == {schedule.batch_size(config, images)}
        batch = updates[0].batch_size
        assert [update.start for update in updates] == [position + number * batch for number in range(len(updates))]
        assert [update.images for update in updates] == [images + number * batch for number in range(len(updates))]
        position += batch * (len(updates) + own)
        images += batch * len(updates)
    assert schedule.used_after(config, steps) == (position, images)


R3GAN_CURVE = {"start": 2.0, "end": 0.2, "over": 20, "shape": "cosine"}


@pytest.mark.parametrize(
    ("shape", "quarter", "half"), [("constant", 2, 2), ("linear", 1.55, 1.1), ("cosine", None, 1.1)]
)
def test_schedules_by_hand(shape: str, quarter: float | None, half: float) -> None:
    """From 2 to 0.2 over 20,000 images, whatever the length of the run; the cosine is FRONTIER's v(n)."""
    curve = ScheduleConfig.model_validate({**R3GAN_CURVE, "shape": shape})
    quarter = 0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2 if quarter is None else quarter
    for length in (20_000, 10**6):
        found = [schedule.value(curve, images, length) for images in (0, 5_000, 10_000, 20_000, 10**9)]
        assert found == pytest.approx([2.0, quarter, half, 0.2, 0.2], abs=1e-12)


@given(
    st.floats(0, 1e3), st.floats(0, 1e3), st.integers(1, 10**9), st.integers(0, 2 * 10**9),
    st.sampled_from(["constant", "linear", "cosine"]),
)  # fmt: skip
def test_a_schedule_stays_between_its_ends(start: float, end: float, length: int, images: int, shape: str) -> None:
    if start == end:
        return
    curve = ScheduleConfig.model_validate({"start": start, "end": end, "shape": shape})
    low, high = sorted((start, end))
    found = schedule.value(curve, images, length)
    assert low - 1e-9 <= found <= high + 1e-9
    assert found == end or images < length
    assert schedule.value(start, images, length) == start


def test_a_schedule_without_a_length_lasts_the_run() -> None:
    curve = ScheduleConfig(start=1.0, end=0.0)
    assert [schedule.value(curve, images, 400) for images in (0, 100, 400)] == [1.0, 0.75, 0.0]


def test_all_schedules_are_found_by_their_keys() -> None:
    config = Config.model_validate(
        {
            "run_dir": "r",
            "data": {"path": "d", "resolution": 32},
            "discriminator": {"optimizer": {"learning_rate": R3GAN_CURVE, "betas": [0, {"start": 0.9, "end": 0.99}]}},
            "objective": {"r1": {"gamma": R3GAN_CURVE}, "r2": {"gamma": 1.0}},
            "training": {"steps": 9, "batch_size": 6},
        }
    )
    assert set(dict(schedule.scheduled(config))) == {
        "discriminator.optimizer.learning_rate", "discriminator.optimizer.betas.1", "objective.r1.gamma",
        "ema.half_life_kimg",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "at_half", "at_end"), [("constant", 1.0, 0.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_learning_rates(kind: str, at_half: float, at_end: float) -> None:
    optimizer = OptimizerConfig.model_validate({"learning_rate": {"start": 0.2, "end": 0, "shape": kind}})
    rates = [schedule.optimizer_settings(optimizer, 7, images, 100)["lr"] for images in (0, 50, 100, 200)]
    assert rates == pytest.approx([0.2, 0.2 * at_half, 0.2 * at_end, 0.2 * at_end])
    constant = OptimizerConfig(learning_rate=0.2)
    assert schedule.optimizer_settings(constant, 7, 50, 100) == {"lr": 0.2}


def test_betas_follow_their_schedules() -> None:
    optimizer = OptimizerConfig.model_validate({"betas": [0, {"start": 0.9, "end": 0.99, "over": 20}]})
    settings = schedule.optimizer_settings(optimizer, 0, 10_000, 1)
    assert settings == {"lr": 2e-4, "betas": pytest.approx((0.0, 0.945))}
    rmsprop = OptimizerConfig.model_validate({"name": "rmsprop", "alpha": {"start": 0.9, "end": 0.99, "over": 20}})
    assert schedule.optimizer_settings(rmsprop, 0, 20_000, 1)["alpha"] == pytest.approx(0.99)


def test_warm_up_rises_linearly_and_never_starts_at_zero() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    rates = [schedule.optimizer_settings(optimizer, step, 0, 100)["lr"] for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@given(st.floats(0.1, 100), st.integers(1, 4096))
def test_ema_half_life_is_in_images(half_life_kimg: float, batch: int) -> None:
    decay = schedule.ema_decay(EMAConfig(half_life_kimg=half_life_kimg), 10**9, batch, 10**10)
    steps = half_life_kimg * 1000 / batch
    assert decay**steps == pytest.approx(0.5, rel=1e-6)


def test_the_default_half_life_is_stylegans_ramp() -> None:
    """min(10,000, 0.05 n) after n images (Karras et al. 2021, released code)."""
    ema = EMAConfig()
    assert schedule.ema_decay(ema, 0, 64, 10**6) == 0.0
    for images in (1, 20_000, 150_000, 200_000, 10**7):
        half_life = min(10_000, 0.05 * images)
        assert schedule.ema_decay(ema, images, 500, 10**6) == pytest.approx(0.5 ** (500 / half_life))


def test_r3gans_half_life_at_a_million_images() -> None:
    """Its CIFAR-10 preset rises from 0 to 5 million over 20 million images: 30,779 by its cosine at one million."""
    ema = EMAConfig.model_validate({"half_life_kimg": {"start": 0, "end": 5000, "over": 20_000, "shape": "cosine"}})
    assert schedule.ema_decay(ema, 10**6, 512, 10**9) == pytest.approx(0.5 ** (512 / 30_779), abs=1e-6)


@given(st.integers(1, 5000), st.integers(1, 70), st.integers(1, 3))
@example(2039, 1, 1)  # 1000 * 2.039 is more than 2039
def test_a_run_ends_at_the_first_step_with_enough_images(images: int, batch: int, critic_steps: int) -> None:
    training = {"kimg": images / 1000, "batch_size": batch, "critic_steps": critic_steps}
    values = {"run_dir": "r", "data": {"path": "d", "resolution": 32}, "training": training}
    needed = -(-images // (batch * critic_steps))
    assert schedule.run_steps(Config.model_validate(values)) == needed
    assert schedule.run_images(Config.model_validate(values)) == needed * batch * critic_steps
    sooner = {**values, "training": {**training, "steps": max(1, needed - 1)}}
    assert schedule.run_steps(Config.model_validate(sooner)) == max(1, needed - 1)


def wgan(**training: object) -> Config:
    values = {"steps": 2000, "batch_size": 64, "critic_steps": 5, "extra_critic_steps": {}, **training}
    return Config.model_validate({"run_dir": "r", "data": {"path": "d", "resolution": 32}, "training": values})


def test_wgans_long_critic_steps() -> None:
    """100 critic steps in the first 25 generator steps and in each 500th (Arjovsky et al. 2017, released code)."""
    long = [step for step in range(1200) if schedule.critic_steps(wgan(), step) == 100]
    assert long == [*range(25), 500, 1000]
    assert schedule.critic_steps(wgan(), 30) == 5


@given(st.integers(0, 60), st.integers(1, 7), st.integers(0, 12), st.none() | st.integers(1, 9), st.integers(0, 3))
def test_updates_before_a_step_are_those_of_all_earlier_steps(
    step: int, usual: int, first: int, every: int | None, initial_critic_steps: int
) -> None:
    extra = {"updates": 11, "first": first, "every": every}
    config = wgan(critic_steps=usual, extra_critic_steps=extra, initial_critic_steps=initial_critic_steps)
    assert schedule.updates_before(config, step) == sum(schedule.critic_steps(config, s) for s in range(step))
    assert schedule.used_after(config, step).images == 64 * schedule.updates_before(config, step)


def test_a_warm_start_belongs_to_the_first_step() -> None:
    config = wgan(extra_critic_steps=None, initial_critic_steps=7)
    assert [schedule.critic_steps(config, step) for step in range(3)] == [12, 5, 5]
