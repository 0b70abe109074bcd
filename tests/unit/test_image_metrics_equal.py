"""Values of metrics of images against torchmetrics' own, torch-fidelity, and the metrics of features that runs use."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from distgan.evaluation.metrics.inception_score import InceptionScoreOfLogits
from distgan.evaluation.metrics.kid import KernelDistanceToReference
from distgan.metrics import FrechetDistance, InceptionScore, KernelDistance
from tests.image_metrics import CLASSES, FAKES, REALS, Classifier, Logits, Network, TensorImages, detector, pair, update


def test_frechet_distance_is_the_textbooks() -> None:
    found = update(FrechetDistance(detector())).compute()
    a, b = (Network()(images).double().numpy() for images in (REALS, FAKES))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(found) > 1


def test_equal_to_torchmetrics_frechet_distance() -> None:
    theirs = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=Network())
    expected = float(update(theirs, batch=70).compute())
    assert float(update(FrechetDistance(detector())).compute()) == pytest.approx(expected, rel=1e-4)


def test_equal_to_torchmetrics_kernel_distance() -> None:
    """On the same subsets, which both draw at random in their own way."""
    theirs = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance(
        feature=Network(), subsets=7, subset_size=60
    )
    metric = update(KernelDistance(detector(), subsets=7, subset_size=60, seed=3))
    found = metric.compute()
    update(theirs)
    drawn: list[Tensor] = []
    with patch("distgan.evaluation.image_metrics.subset_distance", lambda *a: drawn.extend(a[2:])):
        metric._computed = None
        metric.compute()
    subsets = iter([side for both in zip(drawn[1], drawn[0], strict=True) for side in both])
    with patch("torch.randperm", lambda _: next(subsets)):
        expected = theirs.compute()
    assert pair(found) == pytest.approx(pair(expected), rel=1e-3)
    assert found.deviation > 0


def test_equal_to_torchmetrics_inception_score() -> None:
    """With splits of one size, in its random order, but for its sample standard deviation."""
    theirs = pytest.importorskip("torchmetrics.image.inception").InceptionScore(feature=Logits(), splits=5)
    theirs.update(FAKES)
    torch.manual_seed(7)
    expected = pair(theirs.compute())
    torch.manual_seed(7)
    order = torch.randperm(len(FAKES))
    metric = InceptionScore(detector(), splits=5)
    metric.update(FAKES, numbers=order.argsort())
    found = pair(metric.compute())
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1] * (4 / 5) ** 0.5, rel=1e-4)
    assert 1 < found[0] < CLASSES


def test_equal_to_torch_fidelity() -> None:
    """All three, from images to values, with subsets of all images so that their choice does not matter."""
    torch_fidelity = pytest.importorskip("torch_fidelity")

    class Extractor(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc, name-defined]
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.network = Classifier()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return {"isc": "logits"}.get(metric, "features")

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            outputs = dict(zip(("features", "logits"), self.network(images), strict=True))
            return tuple(outputs[name] for name in self.features_list)

    reals = REALS[: len(FAKES)]
    registry = "torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY"
    with patch.dict(registry, {"random": Extractor}):
        expected = torch_fidelity.calculate_metrics(
            input1=TensorImages(FAKES), input2=TensorImages(reals), fid=True, kid=True, isc=True,
            feature_extractor="random", kid_subsets=2, kid_subset_size=len(FAKES), samples_shuffle=False, batch_size=32,
            cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        )  # fmt: skip
    fid = FrechetDistance(detector())
    kid = KernelDistance(detector(), subsets=2, subset_size=len(FAKES))
    score = InceptionScore(detector())
    for metric, images, real in itertools.product((fid, kid), (reals, FAKES), (True, False)):
        if real == (images is reals):
            metric.update(images, real=real)
    score.update(FAKES, numbers=torch.arange(len(FAKES)))
    assert float(fid.compute()) == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert float(kid.compute().mean) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert float(kid.compute().deviation) == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-4)
    assert float(score.compute().mean) == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert float(score.compute().deviation) == pytest.approx(expected["inception_score_std"], rel=1e-4)


def test_numbered_images_have_the_values_of_a_run() -> None:
    """The same subsets and splits as the metrics of features, in whatever order the images come."""
    seen = detector()
    order = torch.randperm(len(FAKES), generator=torch.Generator().manual_seed(0))
    kid, score = KernelDistance(seen, subset_size=50), InceptionScore(seen)
    for part in order.split(33):
        kid.update(FAKES[part], real=False, numbers=part)
        score.update(FAKES[part], numbers=part)
    kid.update(REALS, real=True, numbers=torch.arange(len(REALS)))
    features, logits = seen(FAKES)
    with patch("distgan.evaluation.metrics.kid.SUBSET_SIZE", 50):
        other = KernelDistanceToReference(seen(REALS).features, len(FAKES))
    other.update(features, torch.arange(len(FAKES)))
    assert pair(kid.compute()) == pytest.approx(pair(other.compute()), rel=1e-5)
    of_logits = InceptionScoreOfLogits(CLASSES, len(FAKES))
    of_logits.update(logits, torch.arange(len(FAKES)))
    assert pair(score.compute()) == pytest.approx(pair(of_logits.compute()), rel=1e-6)
