"""Metrics of images for any trainer: Fréchet distance, kernel distance and inception score.

They follow `torchmetrics.Metric`: `update` on every rank with that rank's images, `compute` on every rank. States have
an ordinary `dist_reduce_fx`, so torchmetrics synchronizes them over the default process group by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from distgan.data.order import permute
from distgan.errors import UserError
from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.image_metric_base import Comparison, ImageMetric
from distgan.evaluation.metrics.frechet import frechet_distance, make_reference
from distgan.evaluation.metrics.inception_score import SPLITS, InceptionScoreOfLogits, Score
from distgan.evaluation.metrics.kid import (
    SUBSET_SIZE,
    SUBSETS,
    Distance,
    draw_subset_pairs,
    subset_distance,
    subset_size,
)
from distgan.evaluation.moments import add_to_gram, all_reduce, empty_gram, gaussian_of_gram, samples_in_gram
from distgan.randomness import derive_key

_BATCH = 1000


class FrechetDistance(Comparison):
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


class KernelDistance(Comparison):
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
