"""Numbers that change with the images that the discriminator has been trained on: rates, betas, weights, decays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from pydantic import BaseModel

from distgan.config import EMAConfig, OptimizerConfig, ScheduleConfig


def value(setting: float | ScheduleConfig, images: int, length: int) -> float:
    """Return the value of a number, or of a schedule after `images` images.

    The cosine is that of R3GAN (Huang et al. 2024, training_loop.py:29-38 of the released code).

    Args:
        length: images of the whole run, over which a schedule without `over` changes.
    """
    if not isinstance(setting, ScheduleConfig):
        return setting
    progress = min(1.0, images / (length if setting.over is None else 1000 * setting.over))
    rest = {
        "constant": 1.0 if progress < 1.0 else 0.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[setting.shape]
    return setting.end + (setting.start - setting.end) * rest


def scheduled(section: BaseModel) -> Iterator[tuple[str, ScheduleConfig]]:
    """Yield all schedules of a config with their keys, such as `generator.optimizer.betas.1`."""
    for key, held in section:
        for place, inner in enumerate(held) if isinstance(held, (list, tuple)) else [(None, held)]:
            where = key if place is None else f"{key}.{place}"
            if isinstance(inner, ScheduleConfig):
                yield where, inner
            elif isinstance(inner, BaseModel):
                yield from ((f"{where}.{below}", found) for below, found in scheduled(inner))


def optimizer_settings(
    config: OptimizerConfig, step: int, images: int, length: int, rate: float | None = None
) -> dict[str, Any]:
    """Return what an optimizer's parameter groups hold in step `step`: `lr`, and options that have a schedule.

    Both are scaled for a lazy regularizer if the optimizer's options say so.

    Args:
        images, length: see `value`.
        rate: learning rate in place of the config's, before the warmup.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    factor = config.facts.rate_factor
    settings: dict[str, Any] = {
        "lr": value(config.learning_rate if rate is None else rate, images, length) * warmup * factor
    }
    for key in {place.partition(".")[0] for place, _ in scheduled(config.options)}:
        setting = getattr(config.options, key)
        settings[key] = (
            tuple(value(item, images, length) ** factor for item in setting)
            if isinstance(setting, tuple)
            else value(setting, images, length)
        )
    return settings


def ema_decay(config: EMAConfig, images: int, images_per_step: int, length: int) -> float:
    """Return the weight of the previous average in the EMA update of one step, in [0, 1).

    The half-life is in images, so that it does not depend on the batch size.

    Args:
        images, length: see `value`; images are those before this step.
        images_per_step: real images of this step.
    """
    half_life = 1000.0 * value(config.half_life_kimg, images, length)
    return 0.0 if half_life <= 0 else 0.5 ** (images_per_step / half_life)


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
