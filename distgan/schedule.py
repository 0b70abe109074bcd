"""What happens when, as pure functions of the config and of progress."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from distgan.config import Config, EMAConfig, OptimizerConfig, ZeroCenteredPenaltyConfig


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

    @property
    def fading(self) -> bool:
        """Whether the level is still blended with the one before."""
        return self.fade < 1.0

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return 4 << self.level


def critic_steps(config: Config, step: int) -> int:
    """Discriminator updates of step `step` (0-based); the warm start counts to step 0."""
    extra = config.training.extra_critic_steps
    usual = config.training.critic_steps
    if extra is not None and (step < extra.first or (extra.every is not None and step % extra.every == 0)):
        usual = extra.updates
    return usual + (config.training.initial_critic_steps if step == 0 else 0)


def updates_before(config: Config, step: int) -> int:
    """Discriminator updates of all steps before step `step`."""
    training = config.training
    total = step * training.critic_steps + (training.initial_critic_steps if step > 0 else 0)
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
        yield Update(first + number, position + number * batch, batch, micro_batch(config, position))


def position_after(config: Config, steps: int) -> int:
    """Stream position, which is also the number of real images seen, after `steps` steps from the start."""
    step = position = 0
    for next_level in (*_level_starts(config), math.inf):
        reached = _position_while_batches_last(config, step, position)
        step += bisect.bisect_right(range(step, steps), next_level, key=reached)
        position = reached(step)
    return position


def _position_while_batches_last(config: Config, step: int, position: int) -> Callable[[int], int]:
    """`position_after` from step `step` at `position` on, for as long as batches are as large as there."""
    batch, before = batch_size(config, position), updates_before(config, step)
    return lambda steps: position + (updates_before(config, steps) - before) * batch


def generator_slot(config: Config, step: int) -> int:
    """Address of the first sample that the generator's update of step `step` draws."""
    return step * largest_batch(config)


def growth(config: Config, position: int) -> Growth | None:
    """The growth of a step whose first sample is at stream position `position`; None where networks do not grow.

    The first level trains for `stable_kimg`; each later one is faded in linearly, then trains on (Karras et al. 2018,
    appendix A.1). At the very start of a fade it is still the level before that trains.
    """
    settings = config.growth
    if settings is None:
        return None
    starts, fade = _level_starts(config), round(settings.fade_kimg * 1000)
    begun = bisect.bisect_left(starts, position)
    within = position - starts[begun - 1] if begun else fade
    return Growth(_level(settings.first_resolution) + begun, within / fade if within < fade else 1.0)


def steps_to_grow(config: Config) -> int:
    """After so many steps networks have grown up: the whole of the last level trains."""

    def grown_up(steps: int) -> bool:
        now = growth(config, position_after(config, steps))
        return now is None or (now.resolution == config.data.resolution and not now.fading)

    return bisect.bisect_left(range(2**40), True, key=grown_up)


def _level_starts(config: Config) -> Sequence[int]:
    """The stream positions beyond which each level but the first begins."""
    settings = config.growth
    if settings is None:
        return ()
    levels = _level(config.data.resolution) - _level(settings.first_resolution)
    stable, fade = round(settings.stable_kimg * 1000), round(settings.fade_kimg * 1000)
    return [stable + number * (stable + fade) for number in range(levels)]


def _level(side: int) -> int:
    return side.bit_length() - 3


def resolution(config: Config, position: int) -> int:
    """Pixels a side of the images that a step from stream position `position` trains on."""
    now = growth(config, position)
    return config.data.resolution if now is None else now.resolution


def batch_size(config: Config, position: int) -> int:
    """The global batch of a step whose first sample is at stream position `position`."""
    if config.growth is None:
        return config.training.batch_size
    side = resolution(config, position)
    reached = [known for known in config.growth.batch_sizes if known <= side]
    return config.growth.batch_sizes[max(reached)] if reached else config.training.batch_size


def micro_batch(config: Config, position: int) -> int:
    """The share of `batch_size` that one forward pass of all ranks together sees."""
    return batch_size(config, position) // config.training.gradient_accumulation_steps


def statistics_sizes(config: Config, position: int, world_size: int) -> dict[str, int]:
    """How many samples the batch statistics of a step from stream position `position` are over, by the key they are of.

    They are part of the objective: what it is depends on how a batch is cut.
    """
    whole = micro_batch(config, position)
    sizes = {"global": whole, "rank": whole // world_size}
    objective = config.objective
    used = {
        f"{role}.{key}": over
        for role, network in (("generator", config.generator), ("discriminator", config.discriminator))
        for key, over in network.facts.batch_statistics.items()
    }
    if objective.feature_matching is not None:
        used["objective.feature_matching"] = "global"
    if objective.adversarial.facts.compares_batch:
        used["objective.adversarial"] = "global"
    for number, term in enumerate(objective.terms):
        if term.facts.compares_batch:
            used[f"objective.terms.{number}"] = "global"
    if objective.gradient_penalty is not None and objective.gradient_penalty.points == "uniform":
        used["objective.gradient_penalty"] = "global"
    return {key: sizes[over] for key, over in used.items()}


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


def penalty_gamma(config: ZeroCenteredPenaltyConfig, step: int, steps: int) -> float:
    """The factor of a zero-centered penalty at step `step` (0-based) of `steps` (Huang et al. 2024, appendix)."""
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


def growth_warnings(config: Config) -> tuple[str, ...]:
    """Return a line if the run ends before its networks have grown to their full resolution."""
    needed, last = steps_to_grow(config), config.training.steps
    if needed <= last:
        return ()
    side = resolution(config, position_after(config, last))
    return (
        f"training.steps = {last}: the run ends at {side} pixels per side; the full {config.data.resolution} pixels "
        f"train from step {needed} on; raise training.steps, or lower growth.stable_kimg and growth.fade_kimg",
    )
