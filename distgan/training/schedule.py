"""What happens when, as pure functions of the config and of progress."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distgan.config import Config, EMAConfig, OptimizerConfig


@dataclass(frozen=True)
class Update:
    """One discriminator update of a step: the stream positions [start, start + batch_size) in micro-batches."""

    index: int
    """Number of this discriminator update since the start of training."""
    start: int
    batch_size: int
    micro_batch: int


def discriminator_updates(config: Config, step: int, position: int) -> Iterator[Update]:
    """The discriminator updates of step `step` (0-based), whose first sample is at stream position `position`."""
    batch = config.training.batch_size
    for number in range(config.training.critic_steps):
        index = step * config.training.critic_steps + number
        yield Update(index, position + number * batch, batch, config.micro_batch)


def position_after(config: Config, steps: int) -> int:
    """Stream position, which is also the number of real images seen, after `steps` steps from the start."""
    return steps * config.training.critic_steps * config.training.batch_size


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


def ema_decay(config: EMAConfig, images: int, images_per_step: int) -> float:
    """Weight kept of the average after a step of `images_per_step` images, `images` seen before it.

    The half-life is in images, so that it does not depend on the batch size; with a ramp it is at most
    `rampup * images` (Karras et al. 2021, released code).
    """
    half_life = config.half_life_kimg * 1000.0
    if config.rampup is not None:
        half_life = min(half_life, config.rampup * images)
    return 0.0 if half_life <= 0 else 0.5 ** (images_per_step / half_life)
