"""Warnings at the start of a run: settings that are valid but may be unintended."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from distgan.config import Config
from distgan.config.objective.alignment import alignment_warning
from distgan.data.index.checks import unlisted
from distgan.data.index.table import Index
from distgan.data.order import make_order
from distgan.data.reader import read_samples
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.packages import missing_packages
from distgan.schedule import growth_warnings

logger = logging.getLogger("distgan")

_IMAGES_SEEN = 8
_LEAST_SPREAD = 32
"""Smallest difference between the channels of a pixel that counts as a color: JPEG compression tints gray by less."""


def log_warnings(config: Config, index: Index, runtime: Runtime) -> None:
    """Log on rank 0 each setting that is valid but may be unintended."""
    if not runtime.is_main:
        return
    for warning in run_warnings(config, index, runtime.device):
        logger.warning("%s", warning)
    for package in missing_packages():
        logger.warning("%s is not installed: %s; pip install %s", package.name, package.without, package.name)


def run_warnings(config: Config, index: Index, device: torch.device) -> list[str]:
    """Return a line for each setting of a run that is valid but may be unintended. It reads a few images."""
    return [
        *config_warnings(config), *growth_warnings(config), *unlisted(config.data.path, index),
        *_about_precision(config, device), *_about_labels(config, index), *_about_colors(config, index),
    ]  # fmt: skip


def config_warnings(config: Config) -> Iterator[str]:
    """Yield a line for each setting of a config that is valid but may be unintended, whatever the data are."""
    targets, objective = config.objective.label_smoothing, config.objective
    if targets is not None and targets.fake not in (0.0, (0.0, 0.0)):
        yield (
            f"objective.label_smoothing.fake = {targets.fake}: with targets above 0 for generated samples the "
            "optimal discriminator, (alpha p + beta q) / (p + q), no longer vanishes where there is no data, so "
            "that the generator is held to its present mistakes (Salimans et al. 2016, section 3.4); leave it at 0"
        )
    held = objective.weight_clipping or objective.gradient_penalty or objective.r1 or objective.r2
    discriminator = config.discriminator.facts
    if objective.adversarial.facts.estimates_wasserstein and not held and not discriminator.bounds_slope:
        yield (
            f"objective.adversarial = {objective.adversarial.family}: nothing bounds the critic's slope, so that "
            "its loss has no minimum; set objective.gradient_penalty={} or objective.weight_clipping={}, or "
            "discriminator.spectral_norm=true with discriminator.normalization=none"
        )
    for name in ("r1", "r2"):
        if getattr(objective, name) is not None and discriminator.normalizes_batch:
            yield (
                f"objective.{name}: with batch norm in the discriminator each logit depends on the whole batch, so "
                "that the penalty is not on each sample's own gradient; set discriminator.normalization to layer "
                "or none"
            )
    if (unaligned := alignment_warning(objective.alignment)) is not None:
        yield unaligned
    for role in ("generator", "discriminator"):
        size = getattr(config, role).facts.reference_samples or 0
        if size // config.micro_batch >= 16:
            yield (
                f"{role}.reference_size = {size}: each pass through the network runs its reference batch too, "
                f"which is {size // config.micro_batch} times the micro-batch of {config.micro_batch}; lower it"
            )


def _about_precision(config: Config, device: torch.device) -> Iterator[str]:
    if config.training.mixed_precision == "tf32" and device.type != "cuda":
        yield (
            f"training.mixed_precision = tf32: device {device} has no TF32, float32 is used; run on an NVIDIA GPU to "
            "use TF32"
        )


def _about_labels(config: Config, index: Index) -> Iterator[str]:
    if index.num_classes and "labels" not in config.data.model_fields_set:
        yield (
            f"data.labels: not set, training is unconditional, and the labels of {index.num_classes} classes are not "
            "used; set data.labels=true to condition both networks, or data.labels=false to hide this message"
        )


def _about_colors(config: Config, index: Index) -> Iterator[str]:
    """Warn if the first images of the stream are in color and training is in gray."""
    data = config.data
    if data.kind != "images" or data.channels != 1:
        return
    # Of remote shards only one, because each is fetched whole.
    places = np.arange(1 if index.any_remote else min(_IMAGES_SEEN, len(index)))
    first = make_order(data, config.seed, index).samples(places)
    try:
        images = read_samples(data.model_copy(update={"channels": 3, "retries": 0}), index, first).data
    except UserError:
        return  # training reports what it cannot read
    spread = (images.amax(1) - images.amin(1)).flatten(1).amax(1)
    colored = int((spread >= _LEAST_SPREAD).sum())
    if colored:
        yield (
            f"data.channels = 1: training is in gray, but {colored} of the first {len(places)} images of data.path = "
            f"{data.path} are in color; set data.channels=3 to train in color"
        )
