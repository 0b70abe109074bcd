"""Metrics of images for any trainer: a detector in front of the metrics of features.

They follow `torchmetrics.Metric`: `update` on every rank with that rank's images, `compute` on every rank. States have
an ordinary `dist_reduce_fx`, so torchmetrics synchronizes them over the default process group by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from distgan.data.order import permute
from distgan.errors import UserError
from distgan.evaluation.detectors.features import Detector, Features
from distgan.evaluation.metrics.frechet import frechet_distance, make_reference
from distgan.evaluation.metrics.inception_score import SPLITS, InceptionScoreOfLogits, Score
from distgan.evaluation.metrics.kid import (
    SUBSET_SIZE,
    SUBSETS,
    Distance,
    draw_subset_pairs,
    joined,
    subset_distance,
    subset_size,
)
from distgan.evaluation.moments import add_to_gram, all_reduce, empty_gram, gaussian_of_gram, samples_in_gram
from distgan.randomness import derive_key

_BATCH = 1000


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


class _Comparison(ImageMetric):
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


class FrechetDistance(_Comparison):
    """Fréchet (Inception) distance, FID: update with images, compute a float64 scalar >= 0; lower is better.

    Heusel et al., NeurIPS 2017; see `distgan.evaluation.metrics.frechet`. Moments are summed in float64. The value
    depends on the number of ranks and batches by rounding only. Ranks synchronize with two all-reduces of
    8 (d + 1)^2 bytes: 34 MB each for Inception.
    """

    real_gram: Tensor
    fake_gram: Tensor

    def __init__(self, detector: Detector, *, reset_real_features: bool = True, **settings: Any) -> None:
        """Prepare the sums of both sides.

        Args:
            detector: see `load_detector`.
            reset_real_features: if False, `reset` keeps the real images.
            settings: keyword arguments of `torchmetrics.Metric`. `dist_sync_fn` is by default an all-reduce;
                None is torchmetrics' all-gather, with the same value and W times the memory.
        """
        super().__init__(detector, reset_real_features, **{"dist_sync_fn": all_reduce, **settings})
        self.dimension = detector.dimension
        for name in ("real_gram", "fake_gram"):
            self.add_state(name, empty_gram(detector.dimension), dist_reduce_fx="sum")

    def update(self, images: Tensor, real: bool) -> None:
        """Add images.

        Args:
            images: uint8 in [0, 255], shape (n, C, R, R), on any device.
            real: whether they are real or generated.

        Raises:
            UserError: the images are not uint8, or have a shape that the detector does not take.
        """
        features = self._see(images).features
        name = "real_gram" if real else "fake_gram"
        # A state that was reset or synchronized in inference mode cannot be added to outside it.
        if getattr(self, name).is_inference() and not torch.is_inference_mode_enabled():
            setattr(self, name, getattr(self, name).clone())
        add_to_gram(getattr(self, name), features)

    def compute(self) -> Tensor:
        """Compute the distance of all images of all ranks. Raises UserError for fewer than two on a side."""
        real, generated = (samples_in_gram(gram, self.dimension) for gram in (self.real_gram, self.fake_gram))
        self._check(real, generated, 2)
        if min(real, generated) <= self.dimension:
            rank_zero_warn(
                f"FrechetDistance: found {real} real and {generated} generated images, expected more than "
                f"{self.dimension}, the number of features; the value is far too large and comparable only at equal "
                "numbers of images"
            )
        reference = make_reference(gaussian_of_gram(self.real_gram, self.dimension))
        return frechet_distance(reference, gaussian_of_gram(self.fake_gram, self.dimension))


class KernelDistance(_Comparison):
    """Kernel (Inception) distance, KID: update with images, compute a `Distance` (mean, deviation); lower is better.

    Binkowski et al., ICLR 2018; see `distgan.evaluation.metrics.kid`. All features are kept: 4 d bytes per image.

    `compute` draws the subsets by a seed. Give the images numbers, and the value does not depend on ranks and batches.
    Without numbers, images count in order of rank and update, so another number of ranks draws other subsets: the
    value differs, by about deviation / sqrt(subsets).
    """

    real_features: list[Tensor] | Tensor
    fake_features: list[Tensor] | Tensor

    def __init__(
        self,
        detector: Detector,
        *,
        subsets: int = SUBSETS,
        subset_size: int = SUBSET_SIZE,
        seed: int = 0,
        reset_real_features: bool = True,
        **settings: Any,
    ) -> None:
        """Prepare the features of both sides.

        Args:
            detector: see `load_detector`.
            subsets: number of pairs of subsets, at least 1.
            subset_size: images per subset, at least 2. If a side has fewer images, subsets have half of that side.
            seed: of the subsets.
            reset_real_features: if False, `reset` keeps the real images.
            settings: keyword arguments of `torchmetrics.Metric`.

        Raises:
            UserError: subsets or subset_size are too small.
        """
        if subsets < 1 or subset_size < 2:
            raise UserError(
                f"KernelDistance: found subsets={subsets} and subset_size={subset_size}, expected at least 1 and 2"
            )
        super().__init__(detector, reset_real_features, **settings)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        for name in ("real_features", "fake_features"):
            self._add_rows(name, detector.dimension)

    def update(self, images: Tensor, real: bool, numbers: Tensor | None = None) -> None:
        """Add images.

        Args:
            images: uint8 in [0, 255], shape (n, C, R, R), on any device.
            real: whether they are real or generated.
            numbers: their numbers among the real or the generated images of all ranks, integers >= 0, shape (n,).

        Raises:
            UserError: the images are not uint8, or have a shape that the detector does not take; see also `numbers`.
        """
        self._append("real_features" if real else "fake_features", self._see(images).features, numbers)

    def compute(self) -> Distance:
        """Compute the distance of all images of all ranks.

        Raises UserError for fewer than four images on a side, and for numbers that are missing or repeated.
        """
        reals, fakes = self._rows("real_features")[0], self._rows("fake_features")[0]
        size = subset_size(len(fakes), len(reals), self.subset_size)
        if size < 2:
            self._check(len(reals), len(fakes), 4)
        if size < self.subset_size:
            rank_zero_warn(
                f"KernelDistance: found {len(reals)} real and {len(fakes)} generated images, expected at least "
                f"subset_size={self.subset_size}; subsets of {size} make the value noisier"
            )
        return subset_distance(fakes, reals, *draw_subset_pairs(len(fakes), len(reals), size, self.subsets, self.seed))


class InceptionScore(ImageMetric):
    """Inception score: update with generated images, compute a `Score` (mean, deviation); higher is better.

    Salimans et al., NeurIPS 2016; see `distgan.evaluation.metrics.inception_score`. All logits are kept: 4 k bytes per
    image. `compute` shuffles the images by a seed and splits them into consecutive parts. Images with numbers are
    split in order of their numbers instead, and the value does not depend on ranks and batches.
    """

    higher_is_better = True
    logits: list[Tensor] | Tensor

    def __init__(self, detector: Detector, *, splits: int = SPLITS, seed: int = 0, **settings: Any) -> None:
        """Prepare the logits.

        Args:
            detector: see `load_detector`; it needs logits.
            splits: number of parts, at least 1.
            seed: of the order of images without numbers.
            settings: keyword arguments of `torchmetrics.Metric`.

        Raises:
            UserError: the detector has no logits, or there is no split.
        """
        super().__init__(detector, **settings)
        if not detector.num_logits:
            raise UserError(
                f"InceptionScore: the detector {detector.name} has no logits; let its network return (features, logits)"
            )
        if splits < 1:
            raise UserError(f"InceptionScore: found splits={splits}, expected at least 1")
        self.num_logits, self.splits, self.seed = detector.num_logits, splits, seed
        self._add_rows("logits", detector.num_logits)

    def update(self, images: Tensor, real: bool = False, numbers: Tensor | None = None) -> None:
        """Add images.

        Args:
            images: uint8 in [0, 255], shape (n, C, R, R), on any device.
            real: real images are ignored, so that a `torchmetrics.MetricCollection` can hold all three metrics.
            numbers: the images' numbers among those of all ranks, integers >= 0, shape (n,).

        Raises:
            UserError: the images are not uint8, or have a shape that the detector does not take; see also `numbers`.
        """
        if not real:
            self._append("logits", self._see(images).logits, numbers)

    def compute(self) -> Score:
        """Compute the score of all images of all ranks.

        Raises UserError for fewer images than splits, and for numbers that are missing or repeated.
        """
        logits, sorted_by_number = self._rows("logits")
        count = len(logits)
        if count < self.splits:
            raise UserError(
                f"InceptionScore: found {count} generated images, expected at least {self.splits}, one per split; "
                "update with more images, or lower splits"
            )
        places = np.arange(count)
        if not sorted_by_number:
            places = permute(places, count, derive_key(self.seed, "inception_score/order"))
        score = InceptionScoreOfLogits(self.num_logits, count, self.splits, sync_on_compute=False).to(logits.device)
        for rows, numbers in zip(logits.split(_BATCH), torch.from_numpy(places).split(_BATCH), strict=True):
            score.update(rows, numbers)
        return score.compute()


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
