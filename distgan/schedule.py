"""Training schedules: updates, batch sizes, growth, learning rates and EMA, as pure functions of config and progress.

Steps are 0-based. The stream position is the number of real images that all earlier discriminator updates used.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from distgan.config import Config, EMAConfig, OptimizerConfig, ZeroCenteredPenaltyConfig


@dataclass(frozen=True)
class Update:
    """One discriminator update. It uses the real images at the stream positions [start, start + batch_size)."""

    index: int
    """Number of discriminator updates before this one since the start of training."""
    start: int
    batch_size: int
    """Global batch size, in images."""
    micro_batch: int
    """Images of all ranks per forward pass; divides `batch_size`."""


@dataclass(frozen=True)
class Growth:
    """State of progressive growing."""

    level: int
    """Number of doublings from 4x4 pixels."""
    fade: float
    """Weight of this level's output in the blend with the level before, in (0, 1]."""

    @property
    def fading(self) -> bool:
        """True if this level is blended with the level before."""
        return self.fade < 1.0

    @property
    def resolution(self) -> int:
        """Pixels per side."""
        return 4 << self.level


def critic_steps(config: Config, step: int) -> int:
    """Return the number of discriminator updates of step `step`. `initial_critic_steps` are added to step 0."""
    extra = config.training.extra_critic_steps
    usual = config.training.critic_steps
    if extra is not None and (step < extra.first or (extra.every is not None and step % extra.every == 0)):
        usual = extra.updates
    return usual + (config.training.initial_critic_steps if step == 0 else 0)


def updates_before(config: Config, step: int) -> int:
    """Return the number of discriminator updates of all steps before step `step`."""
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
    """Yield the discriminator updates of step `step`, which starts at stream position `position`."""
    batch = batch_size(config, position)
    first = updates_before(config, step)
    for number in range(critic_steps(config, step)):
        yield Update(first + number, position + number * batch, batch, micro_batch(config, position))


def position_after(config: Config, steps: int) -> int:
    """Return the stream position after the first `steps` steps of a run."""
    step = position = 0
    for next_level in (*_level_starts(config), math.inf):
        reached = _position_while_batches_last(config, step, position)
        step += bisect.bisect_right(range(step, steps), next_level, key=reached)
        position = reached(step)
    return position


def _position_while_batches_last(config: Config, step: int, position: int) -> Callable[[int], int]:
    """Return a function like `position_after`, valid from step `step` at `position` until the batch size changes."""
    batch, before = batch_size(config, position), updates_before(config, step)
    return lambda steps: position + (updates_before(config, steps) - before) * batch


def generator_slot(config: Config, step: int) -> int:
    """Return the position of the first latent that the generator update of step `step` draws.

    Each step has room for the largest batch of the run, so that latents of different steps never share a position.
    """
    return step * largest_batch(config)


def growth(config: Config, position: int) -> Growth | None:
    """Return the growth state of a step that starts at stream position `position`; None without progressive growing.

    The first level trains for `stable_kimg`. Each later level is faded in linearly over `fade_kimg`, then trains for
    `stable_kimg` (Karras et al. 2018, appendix A.1). A step exactly at the start of a fade trains the level before,
    because the fade would be 0.
    """
    settings = config.growth
    if settings is None:
        return None
    starts, fade = _level_starts(config), round(settings.fade_kimg * 1000)
    begun = bisect.bisect_left(starts, position)
    within = position - starts[begun - 1] if begun else fade
    return Growth(_level(settings.first_resolution) + begun, within / fade if within < fade else 1.0)


def steps_to_grow(config: Config) -> int:
    """Return the number of steps after which the networks train at full resolution, without fading."""

    def grown_up(steps: int) -> bool:
        now = growth(config, position_after(config, steps))
        return now is None or (now.resolution == config.data.resolution and not now.fading)

    return bisect.bisect_left(range(2**40), True, key=grown_up)


def _level_starts(config: Config) -> Sequence[int]:
    """Return the stream positions at which the fades begin, one for each level after the first."""
    settings = config.growth
    if settings is None:
        return ()
    levels = _level(config.data.resolution) - _level(settings.first_resolution)
    stable, fade = round(settings.stable_kimg * 1000), round(settings.fade_kimg * 1000)
    return [stable + number * (stable + fade) for number in range(levels)]


def _level(side: int) -> int:
    return side.bit_length() - 3


def resolution(config: Config, position: int) -> int:
    """Return the pixels per side of the images in a step that starts at stream position `position`."""
    now = growth(config, position)
    return config.data.resolution if now is None else now.resolution


def batch_size(config: Config, position: int) -> int:
    """Return the global batch size of a step that starts at stream position `position`."""
    if config.growth is None:
        return config.training.batch_size
    side = resolution(config, position)
    reached = [known for known in config.growth.batch_sizes if known <= side]
    return config.growth.batch_sizes[max(reached)] if reached else config.training.batch_size


def micro_batch(config: Config, position: int) -> int:
    """Return the number of samples per forward pass of all ranks together, in a step that starts at `position`."""
    return batch_size(config, position) // config.training.gradient_accumulation_steps


def statistics_sizes(config: Config, position: int, world_size: int) -> dict[str, int]:
    """Return the number of samples behind each batch statistic of a step that starts at stream position `position`.

    These numbers define the objective, so they may not change on resume unless the user accepts it.

    Returns:
        Config key -> number of samples, for the keys in use.
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
    """Return the largest global batch size of the run."""
    sizes: Iterable[int] = config.growth.batch_sizes.values() if config.growth is not None else ()
    return max((config.training.batch_size, *sizes))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of step `step` of `steps`: the schedule, times a linear warm-up and `rate_factor`.

    `linear` and `cosine` decay from the first step on, and reach 0 at `step == steps`.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    progress = min(1.0, step / steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * config.facts.rate_factor * warmup * decay  # type: ignore[no-any-return]


def penalty_gamma(config: ZeroCenteredPenaltyConfig, step: int, steps: int) -> float:
    """Return gamma of a zero-centered penalty at step `step` of `steps`.

    It follows a cosine from `gamma` to `final_gamma` (Huang et al. 2024, appendix).
    """
    final = config.gamma if config.final_gamma is None else config.final_gamma
    share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))
    return final + (config.gamma - final) * share


def ema_decay(config: EMAConfig, images: int, images_per_step: int) -> float:
    """Return the weight of the previous average in the EMA update of one step, in [0, 1).

    The half-life is in images, so that it does not depend on the batch size. With a ramp-up it is at most
    `rampup * images` (Karras et al. 2021, released code).

    Args:
        images: real images seen before this step.
        images_per_step: real images of this step.
    """
    half_life = config.half_life_kimg * 1000.0
    if config.rampup is not None:
        half_life = min(half_life, config.rampup * images)
    return 0.0 if half_life <= 0 else 0.5 ** (images_per_step / half_life)


def growth_warnings(config: Config) -> tuple[str, ...]:
    """Return one warning if the run ends before its networks train at full resolution, otherwise none."""
    needed, last = steps_to_grow(config), config.training.steps
    if needed <= last:
        return ()
    side = resolution(config, position_after(config, last))
    return (
        f"training.steps = {last}: the run ends at {side} pixels per side; the full {config.data.resolution} pixels "
        f"train from step {needed} on; raise training.steps, or lower growth.stable_kimg and growth.fade_kimg",
    )


@cache
def power_exponent(std: float) -> float:
    """Return the exponent gamma of the power-function average t^gamma of relative standard deviation `std`.

    Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models"), equation 123: the largest
    root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2, for std in (0, 12^-1/2].
    """
    inverse = std**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def power_decay(std: float, images: int, images_per_step: int) -> float:
    """Return the weight of the previous power-function average in the update of one step, in [0, 1).

    Karras et al. 2024, equation 127, with time in images: (1 - 1/t)^(gamma + 1) at step t, so that the first step is
    the live weights.

    Args:
        images: real images seen before this step.
        images_per_step: real images of this step.
    """
    share = images / (images + images_per_step)
    return math.pow(share, power_exponent(std) + 1.0)


def snapshot_due(config: EMAConfig, before: int, after: int) -> bool:
    """Return True if a snapshot of the power-function averages is due in a step, by images seen before and after it."""
    every = config.snapshot_kimg * 1000.0
    return bool(config.profiles) and after // every > before // every
