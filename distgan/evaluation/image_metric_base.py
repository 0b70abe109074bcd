"""Base classes of metrics of images: a detector in front of the metrics of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.detectors.features import Detector, Features
from distgan.evaluation.states import joined


class ImageMetric(Metric):
    """Metric of images by their features.

    The detector is no submodule. It follows the images to their device, and is not part of the metric's parameters or
    state dict. Metrics may share one. `torchmetrics.wrappers.FeatureShare` computes the features once for several.
    """

    is_differentiable = False
    full_state_update = False
    feature_network = "detector"
    """Name of the attribute that `FeatureShare` replaces."""
    detector: Detector

    def __init__(self, detector: Detector, **settings: Any) -> None:
        """settings: keyword arguments of `torchmetrics.Metric`. Raises UserError if it is not a `Detector`."""
        if not isinstance(detector, Detector):
            raise UserError(
                f"{type(self).__name__}: found {type(detector).__name__}, expected a detector; pass "
                "distgan.metrics.load_detector(...)"
            )
        super().__init__(**settings)
        object.__setattr__(self, "detector", detector)
        self._widths: dict[str, int] = {}

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raise UserError: there is no value of one batch."""
        raise UserError(
            f"{type(self).__name__}: a batch has no value of its own; call update(images, ...), and compute() last"
        )

    def sync(self, *arguments: Any, **named: Any) -> None:
        """Do what `torchmetrics.Metric.sync` does, on ranks without images too."""
        device = torch.device("cpu") if self.compute_on_cpu else self.device
        for name, width in self._widths.items():
            rows = getattr(self, name)
            if isinstance(rows, list) and not rows:
                # torchmetrics would gather a tensor with fewer dimensions than those of other ranks, and gloo aborts.
                rows.append(torch.empty(0, width, device=device))
                getattr(self, _numbers(name)).append(torch.empty(0, dtype=torch.int64, device=device))
        super().sync(*arguments, **named)

    def _see(self, images: Tensor) -> Features:
        """Compute the features of images on the metric's device. Raises UserError for images that are not uint8."""
        check_images(images)
        seen: Features = self.detector(images.to(self.device))
        return seen

    def _add_rows(self, name: str, width: int) -> None:
        """Add a state of rows (n, width), with the numbers of their images."""
        self._widths[name] = width
        self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state(_numbers(name), [], dist_reduce_fx="cat")

    def _append(self, name: str, rows: Tensor, numbers: Tensor | None) -> None:
        if numbers is None:
            numbers = torch.full((len(rows),), -1)
        elif numbers.shape != (len(rows),) or numbers.is_floating_point() or bool((numbers < 0).any()):
            raise UserError(
                f"numbers: found {numbers.dtype} of shape {tuple(numbers.shape)}, expected integers >= 0 of shape "
                f"({len(rows)},), one per image"
            )
        getattr(self, name).append(rows)
        getattr(self, _numbers(name)).append(numbers.to(rows.device, torch.int64))

    def _rows(self, name: str) -> tuple[Tensor, bool]:
        """Return all rows, and True if they have numbers and are sorted by them.

        Raises UserError if some images have no number, or two have the same one.
        """
        rows, numbers = joined(getattr(self, name)), joined(getattr(self, _numbers(name)))
        given = int((numbers >= 0).sum())
        if not given:
            return rows, False
        distinct = len(numbers.unique())
        if given < len(rows) or distinct < len(rows):
            raise UserError(
                f"{type(self).__name__}: found {len(rows)} images, {given} with numbers, {distinct} different ones, "
                "expected a number of its own for each image or no numbers; a DistributedSampler repeats images unless "
                "drop_last=True"
            )
        return rows[numbers.argsort()], True


class Comparison(ImageMetric):
    """Metric that compares generated images with real ones."""

    higher_is_better = False

    def __init__(self, detector: Detector, reset_real_features: bool, **settings: Any) -> None:
        super().__init__(detector, **settings)
        self.reset_real_features = reset_real_features

    def reset(self) -> None:
        """Forget the images; the real ones only with `reset_real_features`."""
        states = [] if self.reset_real_features else [name for name in self.metric_state if name.startswith("real_")]
        kept = {name: getattr(self, name) for name in states}
        # Lists are copied, because torchmetrics clears them in place.
        kept = {name: list(state) if isinstance(state, list) else state for name, state in kept.items()}
        super().reset()
        for name, state in kept.items():
            setattr(self, name, state)

    def _check(self, real: int, generated: int, fewest: int) -> None:
        if min(real, generated) < fewest:
            raise UserError(
                f"{type(self).__name__}: found {real} real and {generated} generated images, expected at least "
                f"{fewest} of each; call update(images, real=True) and update(images, real=False)"
            )


def check_images(images: Tensor) -> None:
    """Raise UserError unless images are uint8 of shape (n, C, H, W)."""
    if images.dtype != torch.uint8:
        raise UserError(
            f"images: found {images.dtype}, expected torch.uint8 in [0, 255]; convert images in [-1, 1] by "
            "((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), images in [0, 1] by "
            "(images * 255).round().clamp(0, 255).to(torch.uint8)"
        )
    if images.ndim != 4:
        raise UserError(f"images: found shape {tuple(images.shape)}, expected (n, C, H, W)")


def _numbers(name: str) -> str:
    return f"{name}_numbers"
