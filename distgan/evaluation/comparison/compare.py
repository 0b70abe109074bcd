"""Compare two sets of images by the metrics of an evaluation, without a run: generated against real."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from distgan import extensions
from distgan.config import Config, DataConfig, EvaluationConfig
from distgan.config.error_messages import explain
from distgan.config.fields import Section
from distgan.config.loading import apply_override
from distgan.data.order import permute
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.comparison.image_sets import ImageSet, open_images
from distgan.evaluation.comparison.published_statistics import with_real_statistics
from distgan.evaluation.names import value_name
from distgan.evaluation.samples import read_reals
from distgan.evaluation.suite import Evaluator
from distgan.randomness import derive_key

_DATA_KEYS = ("resolution", "channels", "background", "max_pixels", "max_failure_rate")
"""Keys of `data` that say how images are read."""


class _Sections(Section):
    data: DataConfig
    evaluation: EvaluationConfig


class _Generated:
    """Reads generated images by number, in an addressed random order, so that the first n are a random choice."""

    def __init__(self, images: ImageSet, data: DataConfig) -> None:
        self.images, self.data = images, data
        self.order = permute(np.arange(len(images)), len(images), derive_key(0, "comparison/order"))
        self.unreadable: set[int] = set()

    def __call__(self, numbers: Tensor) -> Tensor:
        """Return images of numbers (n,), uint8 (n, C, R, R). Unreadable ones are black, and kept in `unreadable`."""
        distinct, places = torch.from_numpy(self.order[numbers.numpy()]).unique(return_inverse=True)
        [found] = read_reals(self.data, self.images, [distinct])
        side = self.data.resolution
        images = torch.zeros(len(distinct), self.data.channels, side, side, dtype=torch.uint8)
        images[torch.isin(distinct, found.numbers)] = found.samples
        self.unreadable |= set(distinct.tolist()) - set(found.numbers.tolist())
        return images[places]


def compare_images(
    generated: str | os.PathLike[str],
    real: str | os.PathLike[str] | None,
    overrides: Iterable[str],
    runtime: Runtime,
    *,
    real_statistics: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Compute metrics of a set of generated images against a set of real ones. Collective: call on every rank.

    By default FID with Inception, of all generated images. The result does not depend on the number of ranks.

    Args:
        generated, real: see `open_images`. None for `real` if no metric compares with real images.
        overrides: `key=value` of `evaluation`, and of `data` where it says how images are read.
        real_statistics: .npz file with mean `mu` and covariance `sigma`, in place of real images.

    Returns:
        `generated` and `real`, the numbers of images (no `real` without real images), and the values by name.

    Raises:
        UserError: a set cannot be opened, has unreadable images or images of another size, a key is not accepted, or a
            metric needs something else.
    """
    with runtime.raise_on_all_ranks():
        sets = [open_images(path) for path in (generated, real) if path is not None]
        fake, reference = sets[0], sets[-1]
        statistics = os.fspath(real_statistics) if real_statistics is not None else None
        if real is not None and statistics is not None:
            raise UserError(
                f"--real-statistics {statistics}: takes the place of the real images; leave one of them out"
            )
        config = _parse(sets, overrides)
        if statistics is not None:
            config = with_real_statistics(config, statistics)
        _check_metrics(config, fake, has_reals=real is not None)
    for images in sets:
        fix = "read both sets from a shared folder, or copy them with their times"
        runtime.check_equal(f"{images.path}", images.fingerprint, fix)
    generate = _Generated(fake, config.data)
    values = Evaluator(config, reference, runtime)(generate)
    unreadable = int(runtime.all_reduce_sum(torch.tensor(len(generate.unreadable))))
    if unreadable:
        raise UserError(
            f"{fake.path}: {unreadable} of {len(fake)} images cannot be read, see the warnings above; repair or remove "
            "them",
            everywhere=True,
        )
    counts = {"generated": config.generated_samples} | ({"real": len(reference)} if real is not None else {})
    return {**counts, **values}


def _parse(sets: list[ImageSet], overrides: Iterable[str]) -> Config:
    """Return a config without networks, and set the size that the images must have."""
    fake, reference = sets[0], sets[-1]
    values: dict[str, Any] = {
        "data": {"path": reference.path, "channels": 3, "max_failure_rate": 0},
        "evaluation": {"metrics": ["fid"], "detector": "inception", "num_samples": len(fake)},
    }
    given = list(overrides)
    for override in given:
        section, _, key = override.partition("=")[0].partition(".")
        if section != "evaluation" and not (section == "data" and key in _DATA_KEYS):
            raise UserError(
                f"override {override[:200]!r}: not a key of this comparison; expected evaluation.* or "
                f"data.{', data.'.join(_DATA_KEYS)}"
            )
        extensions.trust_paths_in(override.partition("=")[2])
        apply_override(values, override)
    if "resolution" not in values["data"]:
        values["data"]["resolution"] = _common_size(sets)
        for images in sets:
            images.require_size(values["data"]["resolution"])
    try:
        sections = _Sections.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, _Sections)[1]) from None
    return Config.model_construct(run_dir="", seed=0, data=sections.data, evaluation=sections.evaluation)


def _common_size(sets: list[ImageSet]) -> int:
    """Return the height and width of the first images. Raises UserError if they differ."""
    sizes = [images.first_size() for images in sets]
    width, height = sizes[0]
    if width != height or sizes[0] != sizes[-1]:
        found = " and ".join(f"{w} x {h} pixels in {images.path}" for (w, h), images in zip(sizes, sets, strict=True))
        side = min(min(size) for size in sizes)
        raise UserError(
            f"--images: found {found}, expected squares of one size; set data.resolution={side} to crop all images to "
            "squares and resize them"
        )
    return width


def _check_metrics(config: Config, fake: ImageSet, *, has_reals: bool) -> None:
    """Raise UserError for metrics that measure something else, or want more images than there are."""
    for metric in config.metrics:
        if "images" not in metric.facts.kinds or "generator" in metric.inputs:
            what = "a generator" if "generator" in metric.inputs else " or ".join(metric.facts.kinds)
            raise UserError(f"evaluation.metrics: {metric.metric} needs {what}, found images; remove it")
        if (metric.samples or 0) > len(fake):
            raise UserError(
                f"{fake.path}: {value_name(metric)} measures {metric.samples} generated images, found {len(fake)}; "
                "add images, or set evaluation.num_samples or samples of the metric"
            )
        compares = metric.metric == "classes" or metric.asks_for("reals")
        if not has_reals and compares and not metric.arguments.get("real_statistics"):
            raise UserError(
                f"--images {fake.path}: found one set, but {value_name(metric)} compares with real images; add them as "
                "a second set, or --real-statistics FILE for fid"
            )
