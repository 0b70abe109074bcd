"""What happens when, as pure functions of the config and of progress."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from distgan.config import Config, EMAConfig, OptimizerConfig, ZeroCentredPenaltyConfig


@dataclass(frozen=True)
class Update:
    """One discriminator update of a step: the stream positions [start, start + batch_size) in micro-batches."""

    index: int
    """Number of this discriminator update since the start of training."""
    start: int
    batch_size: int
    micro_batch: int


@dataclass(frozen=True)
class Growth:
    """How far progressive growing has come: the level, counted in doublings from 4x4, and its share in (0, 1]."""

    level: int
    fade: float


def critic_steps(config: Config, step: int) -> int:
    """Discriminator updates of step `step` (0-based); the warm start counts to step 0."""
    extra = config.training.extra_critic_steps
    usual = config.training.critic_steps
    if extra is not None and (step < extra.first or (extra.every is not None and step % extra.every == 0)):
        usual = extra.updates
    return usual + (config.training.warm_start if step == 0 else 0)


def updates_before(config: Config, step: int) -> int:
    """Discriminator updates of all steps before step `step`."""
    training = config.training
    total = step * training.critic_steps + (training.warm_start if step > 0 else 0)
    if training.extra_critic_steps is not None:
        extra = training.extra_critic_steps
        long = min(step, extra.first)
        if extra.every is not None and step > extra.first:
            # Multiples of `every` in [first, step).
            long += -(-step // extra.every) - -(-extra.first // extra.every)
        total += long * (extra.updates - training.critic_steps)
    return total


def discriminator_updates(config: Config, step: int, position: int) -> Iterator[Update]:
    """The discriminator updates of step `step` (0-based), whose first sample is at stream position `position`."""
    batch = batch_size(config, position)
    first = updates_before(config, step)
    for number in range(critic_steps(config, step)):
        yield Update(first + number, position + number * batch, batch, batch // config.training.accumulation)


def position_after(config: Config, steps: int) -> int:
    """Stream position, which is also the number of real images seen, after `steps` steps from the start."""
    if config.growth is None or not config.growth.batch_sizes:
        return updates_before(config, steps) * config.training.batch_size
    position = 0
    for step in range(steps):
        position += critic_steps(config, step) * batch_size(config, position)
    return position


def generator_slot(config: Config, step: int) -> int:
    """Address of the first sample that the generator's update of step `step` draws."""
    return step * largest_batch(config)


def growth(config: Config, position: int) -> Growth | None:
    """The growth of a step whose first sample is at stream position `position`; None where networks do not grow.

    The first level trains for `stable_kimg`; each later one is faded in linearly, then trains on (Karras et al. 2018,
    appendix A.1).
    """
    settings = config.growth
    if settings is None:
        return None
    first, last = (side.bit_length() - 3 for side in (settings.first_resolution, config.data.resolution))
    stable, fade = settings.stable_kimg * 1000.0, settings.fade_kimg * 1000.0
    if position < stable or first == last:
        return Growth(first, 1.0)
    done, within = divmod(position - stable, stable + fade) if stable + fade > 0 else (last, 0.0)
    level = first + 1 + int(done)
    if level > last:
        return Growth(last, 1.0)
    return Growth(level, within / fade if within < fade else 1.0)


def resolution(config: Config, position: int) -> int:
    """Pixels a side of the images that a step from stream position `position` trains on."""
    now = growth(config, position)
    return config.data.resolution if now is None else 4 << now.level


def batch_size(config: Config, position: int) -> int:
    """The global batch of a step whose first sample is at stream position `position`."""
    if config.growth is None:
        return config.training.batch_size
    side = resolution(config, position)
    reached = [known for known in config.growth.batch_sizes if known <= side]
    return config.growth.batch_sizes[max(reached)] if reached else config.training.batch_size


def largest_batch(config: Config) -> int:
    """The largest global batch that any step of the run has."""
    sizes: Iterable[int] = config.growth.batch_sizes.values() if config.growth is not None else ()
    return max((config.training.batch_size, *sizes))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (0-based) of `steps`: linear warm-up, then the schedule; 0 after the last."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    progress = min(1.0, step / steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * warmup * decay


def penalty_gamma(config: ZeroCentredPenaltyConfig, step: int, steps: int) -> float:
    """The factor of a zero-centred penalty at step `step` (0-based) of `steps` (R3GAN: Huang et al. 2024, appendix)."""
    final = config.gamma if config.final_gamma is None else config.final_gamma
    share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))
    return final + (config.gamma - final) * share


def ema_decay(config: EMAConfig, images: int, images_per_step: int) -> float:
    """Weight kept of the average after a step of `images_per_step` images, `images` seen before it.

    The half-life is in images, so that it does not depend on the batch size; with a ramp it is at most
    `rampup * images` (Karras et al. 2021, released code).
    """
    half_life = config.half_life_kimg * 1000.0
    if config.rampup is not None:
        half_life = min(half_life, config.rampup * images)
    return 0.0 if half_life <= 0 else 0.5 ** (images_per_step / half_life)
