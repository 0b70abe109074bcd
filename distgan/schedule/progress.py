"""What a run has done after a number of steps: updates, real samples, batch sizes and growth.

Steps are 0-based. `images` is the number of real images that all earlier discriminator updates used, as papers count
them. The stream position is the number of real images that both players used, so it is the larger one if the generator
draws its own.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from distgan.config import Config

_MAX_STEPS = 2**60
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Update:
    """One discriminator update. It uses the real images at the stream positions [start, start + batch_size)."""

    index: int
    """Number of discriminator updates before this one since the start of training."""
    start: int
    images: int
    """Number of real images that earlier discriminator updates used, and address of its first latent."""
    batch_size: int
    """Global batch size, in images."""
    micro_batch: int
    """Images of all ranks per forward pass; divides `batch_size`."""


class Used(NamedTuple):
    """Real samples that a run has used so far."""

    position: int
    """Stream position: the number of samples that the updates of both players consumed."""
    images: int
    """Number of samples that discriminator updates used."""


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


def discriminator_updates(config: Config, step: int, used: Used) -> Iterator[Update]:
    """Yield the discriminator updates of step `step`, before which a run has used `used`."""
    batch = batch_size(config, used.images)
    first = updates_before(config, step)
    for number in range(critic_steps(config, step)):
        done = number * batch
        yield Update(first + number, used.position + done, used.images + done, batch, micro_batch(config, used.images))


def used_after(config: Config, steps: int) -> Used:
    """Return the real samples that a run has used after its first `steps` steps."""
    step = images = drawn = 0
    for next_level in (*_level_starts(config), math.inf):
        reached = _images_while_batches_last(config, step, images)
        last = step + bisect.bisect_right(range(step, steps), next_level, key=reached)
        drawn += (last - step) * generator_batch_size(config, images)
        step, images = last, reached(last)
    return Used(images + (drawn if config.generator_draws_reals else 0), images)


def _images_while_batches_last(config: Config, step: int, images: int) -> Callable[[int], int]:
    """Return the images after a number of steps, valid from step `step` at `images` until the batch size changes."""
    batch, before = batch_size(config, images), updates_before(config, step)
    return lambda steps: images + (updates_before(config, steps) - before) * batch


def generator_slot(config: Config, step: int) -> int:
    """Return the position of the first latent that the generator update of step `step` draws.

    Each step has room for the largest batch of the run, so that latents of different steps never share a position.
    """
    return step * largest_generator_batch(config)


def growth(config: Config, images: int) -> Growth | None:
    """Return the growth state of a step after `images` images; None without progressive growing.

    The first level trains for `stable_kimg`. Each later level is faded in linearly over `fade_kimg`, then trains for
    `stable_kimg` (Karras et al. 2018, appendix A.1). A step exactly at the start of a fade trains the level before,
    because the fade would be 0.
    """
    settings = config.growth
    if settings is None:
        return None
    starts, fade = _level_starts(config), round(settings.fade_kimg * 1000)
    begun = bisect.bisect_left(starts, images)
    within = images - starts[begun - 1] if begun else fade
    return Growth(_level(settings.first_resolution) + begun, within / fade if within < fade else 1.0)


def steps_to_grow(config: Config) -> int:
    """Return the number of steps after which the networks train at full resolution, without fading."""

    def grown_up(steps: int) -> bool:
        now = growth(config, used_after(config, steps).images)
        return now is None or (now.resolution == config.data.resolution and not now.fading)

    return bisect.bisect_left(range(2**40), True, key=grown_up)


def _level_starts(config: Config) -> Sequence[int]:
    """Return the numbers of images at which the fades begin, one for each level after the first."""
    settings = config.growth
    if settings is None:
        return ()
    levels = _level(config.data.resolution) - _level(settings.first_resolution)
    stable, fade = round(settings.stable_kimg * 1000), round(settings.fade_kimg * 1000)
    return [stable + number * (stable + fade) for number in range(levels)]


def _level(side: int) -> int:
    return side.bit_length() - 3


def resolution(config: Config, images: int) -> int:
    """Return the pixels per side of the images in a step after `images` images."""
    now = growth(config, images)
    return config.data.resolution if now is None else now.resolution


def batch_size(config: Config, images: int) -> int:
    """Return the global batch size of a step after `images` images."""
    by_resolution = config.growth.batch_sizes if config.growth is not None else {}
    return _at_resolution(by_resolution, config, images) or config.training.batch_size


def rate_at_resolution(config: Config, images: int) -> float | None:
    """Return the learning rate of `growth.learning_rates` in a step after `images` images; None if there is none."""
    return _at_resolution(config.growth.learning_rates, config, images) if config.growth is not None else None


def _at_resolution(by_resolution: Mapping[int, _Number], config: Config, images: int) -> _Number | None:
    """Return the value of the highest listed resolution that a step after `images` images has reached, if any."""
    side = resolution(config, images)
    reached = [known for known in by_resolution if known <= side]
    return by_resolution[max(reached)] if reached else None


def generator_batch_size(config: Config, images: int) -> int:
    """Return the global batch size of the generator update of a step after `images` images."""
    return config.training.generator_batch_size or batch_size(config, images)


def micro_batch(config: Config, images: int) -> int:
    """Return the number of samples per forward pass of all ranks together, in a step after `images` images."""
    return batch_size(config, images) // config.training.accumulation


def generator_micro_batch(config: Config, images: int) -> int:
    """Return the same for the generator update of the step."""
    return generator_batch_size(config, images) // config.training.accumulation


def stream_micro_batches(config: Config, step: int, images: int) -> Iterator[int]:
    """Yield the sizes of the micro-batches of reals from step `step` at `images` images on.

    They are those of both players if the generator draws its own. Valid until the batch size changes.
    """
    accumulation = config.training.accumulation
    for later in itertools.count(step):
        yield from itertools.repeat(micro_batch(config, images), critic_steps(config, later) * accumulation)
        if config.generator_draws_reals:
            yield from itertools.repeat(generator_micro_batch(config, images), accumulation)


def statistics_sizes(config: Config, images: int, world_size: int, player: str) -> dict[str, int]:
    """Return the number of samples behind each batch statistic in an update of a player after `images` images.

    These numbers define the objective, so they may not change on resume unless the user accepts it.

    Args:
        player: `generator` or `discriminator`; its updates run both networks.

    Returns:
        Config key -> number of samples, for the keys in use.
    """
    whole = (generator_micro_batch if player == "generator" else micro_batch)(config, images)
    sizes = {"global": whole, "rank": whole // world_size}
    objective = config.objective
    used = {
        f"{role}.{key}": over
        for role, network in (("generator", config.generator), ("discriminator", config.discriminator))
        for key, over in network.facts.batch_statistics.items()
    }
    if objective.feature_matching is not None and player == "generator":
        used["objective.feature_matching"] = "global"
    if objective.adversarial.facts.compares_batch:
        used["objective.adversarial"] = "global"
    for number, term in enumerate(objective.terms):
        if term.facts.compares_batch and term.player == player:
            used[f"objective.terms.{number}"] = "global"
    if objective.reconstruction is not None and objective.reconstruction.adaptive and player == "generator":
        used["objective.reconstruction.adaptive"] = "global"
    penalty = objective.gradient_penalty
    if penalty is not None and penalty.points == "uniform" and player == "discriminator":
        used["objective.gradient_penalty"] = "global"
    return {key: sizes[over] for key, over in used.items()}


def largest_batch(config: Config) -> int:
    """Return the largest global batch size of the run's discriminator updates."""
    sizes: Iterable[int] = config.growth.batch_sizes.values() if config.growth is not None else ()
    return max((config.training.batch_size, *sizes))


def largest_generator_batch(config: Config) -> int:
    """Return the largest global batch size of the run's generator updates."""
    return config.training.generator_batch_size or largest_batch(config)


def run_steps(config: Config) -> int:
    """Return the number of steps of a whole run."""
    training = config.training
    if training.kimg is None:
        assert training.steps is not None
        return training.steps
    images = _images(training.kimg)
    reached = bisect.bisect_left(range(_MAX_STEPS), images, key=lambda steps: used_after(config, steps).images)
    return reached if training.steps is None else min(reached, training.steps)


def is_over(config: Config, step: int, images: int) -> bool:
    """Return True if a run that has done `step` steps with `images` images is at its end."""
    steps, kimg = config.training.steps, config.training.kimg
    return (steps is not None and step >= steps) or (kimg is not None and images >= _images(kimg))


def _images(kimg: float) -> int:
    """Return the number of images of a length in thousands, which floats such as 2.039 miss by a rounding error."""
    return math.ceil(round(1000 * kimg, 6))


def run_images(config: Config) -> int:
    """Return the number of images that the discriminator is trained on in a whole run."""
    return used_after(config, run_steps(config)).images


def growth_warnings(config: Config) -> tuple[str, ...]:
    """Return one warning if the run ends before its networks train at full resolution, otherwise none."""
    needed, last = steps_to_grow(config), run_steps(config)
    if needed <= last:
        return ()
    side = resolution(config, used_after(config, last).images)
    key = "steps" if config.training.steps == last else "kimg"
    return (
        f"training.{key} = {getattr(config.training, key)}: the run ends at {side} pixels per side; the full "
        f"{config.data.resolution} pixels train from step {needed} on; raise training.{key}, or lower "
        "growth.stable_kimg and growth.fade_kimg",
    )
