"""Metrics of images against torchmetrics' own, torch-fidelity, and the metrics of features that runs use."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import FeatureShare

from distgan.errors import UserError
from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.metrics.inception_score import InceptionScoreOfLogits
from distgan.evaluation.metrics.kid import KernelDistanceToReference
from distgan.metrics import FrechetDistance, InceptionScore, KernelDistance, load_detector

ROOT = Path(__file__).parents[2]
SHAPE = (3, 16, 16)
FEATURES, CLASSES = 12, 5


class Network(nn.Module):
    """Random weights: features (n, 12) of uint8 images (n, 3, 16, 16)."""

    num_features = FEATURES

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(768, features, generator=generator) / 4)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return (images.flatten(1) / 127.5 - 1) @ self.get_buffer("weight")


class Classifier(Network):
    """Features (n, 12), and logits (n, 5)."""

    def forward(self, images: Tensor) -> Any:
        features = super().forward(images)
        return features, features[:, :CLASSES] / 2


class Logits(Classifier):
    """The logits alone, as torchmetrics takes them."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[1]


def pictures(count: int, seed: int) -> Tensor:
    """Noise with a random brightness for each image, darker with the seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 200, (count, *SHAPE), generator=generator)
    return (images + torch.randint(0, 56 - 8 * seed, (count, 1, 1, 1), generator=generator)).to(torch.uint8)


REALS, FAKES = pictures(130, 1), pictures(110, 2)


def detector() -> Detector:
    return load_detector(Classifier(), image_shape=SHAPE)


def update(metric: Any, batch: int = 40, **numbers: bool) -> Any:
    for images, real in ((REALS, True), (FAKES, False)):
        for part in images.split(batch):
            metric.update(part, real=real)
    return metric


def pair(result: Any) -> list[float]:
    return [float(value) for value in result]


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


class _Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


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
            input1=_Images(FAKES), input2=_Images(reals), fid=True, kid=True, isc=True, feature_extractor="random",
            kid_subsets=2, kid_subset_size=len(FAKES), samples_shuffle=False, batch_size=32, cuda=False, cache=False,
            verbose=False, save_cpu_ram=True,
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


def test_without_numbers_the_seed_decides() -> None:
    def values(seed: int) -> list[float]:
        kid, score = KernelDistance(detector(), subset_size=50, seed=seed), InceptionScore(detector(), seed=seed)
        return pair(update(kid, batch=seed + 20).compute()) + pair(update(score, batch=seed + 20).compute())

    first = values(0)
    torch.manual_seed(5)
    assert values(0) == first
    other = values(1)
    assert all(a != b for a, b in zip(first, other, strict=True))
    # KID's mean varies by about its deviation over the root of 100 subsets.
    assert abs(first[0] - other[0]) < 5 * first[1] / 10


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance])
def test_reals_are_kept_on_request(metric: Any) -> None:
    settings = {} if metric is FrechetDistance else {"subset_size": 60}
    kept = update(metric(detector(), reset_real_features=False, **settings))
    expected = kept.compute()
    kept.reset()
    kept.update(FAKES, real=False)
    assert torch.equal(torch.as_tensor(kept.compute()), torch.as_tensor(expected))
    forgetful = update(metric(detector(), **settings))
    forgetful.reset()
    forgetful.update(FAKES, real=False)
    with pytest.raises(UserError, match=rf"{metric.__name__}: found 0 real and 110 generated images, .*real=True"):
        forgetful.compute()


def test_one_collection_of_three_computes_features_once() -> None:
    network = Classifier()
    seen = load_detector(network, image_shape=SHAPE)
    expected = [update(metric(seen)).compute() for metric in (FrechetDistance, KernelDistance, InceptionScore)]
    metrics = [FrechetDistance(seen), KernelDistance(seen), InceptionScore(seen)]
    plain, shared = MetricCollection(metrics), FeatureShare([metric.clone() for metric in metrics])
    for collection in (plain, shared):
        found = update(collection).compute()
        for name, value in zip(("FrechetDistance", "KernelDistance", "InceptionScore"), expected, strict=True):
            parts = pair(found[name]) if isinstance(found[name], tuple) else [float(found[name])]
            assert parts == (pair(value) if isinstance(value, tuple) else [float(value)])
    (cache,) = {id(metric.detector): metric.detector for metric in shared.values()}.values()
    cache.network.network.module.calls = 0
    shared.update(FAKES, real=False)
    assert cache.network.network.module.calls == 1


def test_the_detector_is_no_part_of_a_models_weights() -> None:
    model = nn.Module()
    model.linear = nn.Linear(2, 2)
    model.fid = update(FrechetDistance(detector()))
    expected = float(model.fid.compute())
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    model.train().half().requires_grad_(True)
    model.fid.reset()
    assert float(update(model.fid).compute()) == expected
    assert not model.fid.detector.training
    assert {tensor.dtype for tensor in model.fid.detector.buffers()} == {torch.float32}


def test_metrics_can_be_copied_and_pickled() -> None:
    for metric in (FrechetDistance(detector()), KernelDistance(detector(), subset_size=9), InceptionScore(detector())):
        update(metric)
        for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):  # noqa: S301
            assert torch.equal(torch.as_tensor(other.compute()), torch.as_tensor(metric.compute()))


def test_updates_record_no_gradients() -> None:
    network = nn.Sequential(nn.Flatten(), _Scale(), nn.Linear(768, 6))
    metric = KernelDistance(load_detector(network, image_shape=SHAPE), subset_size=9)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        metric.update(FAKES, real=False)
    metric.update(REALS, real=True)
    assert not any(rows.requires_grad for rows in (*metric.real_features, *metric.fake_features))
    torch.testing.assert_close(metric.fake_features[0], network(FAKES).detach())
    assert network[2].weight.requires_grad
    assert network.training


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance, InceptionScore])
def test_inference_mode_may_come_and_go(metric: Any) -> None:
    mine = metric(detector())
    with torch.inference_mode():
        expected = update(mine).compute()
        mine.reset()
    found = update(mine).compute()
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


class _Scale(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images / 255


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance, InceptionScore])
def test_other_images_are_refused_in_one_line(metric: Any) -> None:
    mine = metric(detector())
    images = torch.rand(4, *SHAPE) * 2 - 1
    with pytest.raises(UserError, match=r"found torch.float32, expected torch.uint8 in \[0, 255\]") as caught:
        mine.update(images, real=False)
    assert "\n" not in str(caught.value)
    conversions = re.findall(r"in \[[-01, ]+\] by (.*?\.to\(torch.uint8\))", str(caught.value))
    assert len(conversions) == 2
    for conversion, low in zip(conversions, (-1, 0), strict=True):
        ends = eval(conversion, {"torch": torch, "images": torch.tensor([low - 0.01, low, 1.0, 1.01])})
        assert ends.tolist() == [0, 0, 255, 255]
    with pytest.raises(UserError, match=r"found shape \(3, 16, 16\), expected \(n, C, H, W\)"):
        mine.update(FAKES[0], real=False)
    with pytest.raises(UserError, match=r"call update\(images"):
        mine(FAKES, real=False)


def test_mistakes_are_refused_in_one_line() -> None:
    seen = detector()
    calls: list[tuple[Any, str]] = [
        (lambda: FrechetDistance(Network()), r"found Network, expected a detector; pass .*load_detector"),
        (lambda: InceptionScore(load_detector(Network(), image_shape=SHAPE)), "Network has no logits"),
        (lambda: InceptionScore(seen, splits=0), "splits=0"),
        (lambda: KernelDistance(seen, subset_size=1), "subset_size=1"),
        (lambda: update(InceptionScore(seen, splits=111)).compute(), "found 110 generated images, .* at least 111"),
        (lambda: KernelDistance(seen).update(FAKES, False, torch.arange(3)), r"shape \(3,\), expected .* \(110,\)"),
        (lambda: KernelDistance(seen).update(FAKES, False, torch.arange(110) - 1), "expected integers >= 0"),
    ]
    few = KernelDistance(seen)
    few.update(REALS, real=True)
    few.update(FAKES[:3], real=False)
    calls.append((few.compute, "found 130 real and 3 generated images, expected at least 4"))
    for numbers, found in ((torch.arange(110) // 2, "110 with numbers, 55 different"), (None, "220 images, 110 with")):
        score = InceptionScore(seen)
        score.update(FAKES, numbers=numbers)
        if numbers is None:
            score.update(FAKES, numbers=torch.arange(110))
        calls.append((score.compute, found))
    for call, message in calls:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_too_few_images_are_a_warning() -> None:
    wide = load_detector(Network(128), image_shape=SHAPE)
    with pytest.warns(UserWarning, match="130 real and 110 generated images, expected more than 128"):
        update(FrechetDistance(wide)).compute()
    with pytest.warns(UserWarning, match="subset_size=1000; subsets of 55"):
        update(KernelDistance(detector())).compute()


def test_the_page_shows_code_that_runs() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    inception = 'load_detector("inception")'
    assert inception in block
    # A small network in place of a download; nothing else is changed.
    found: dict[str, Any] = {"detector": load_detector(Classifier(), image_shape=SHAPE)}
    exec(block.replace(inception, "detector"), found)
    assert float(found["fid"].compute()) > 0
    for name in ("fid", "kid", "score"):
        assert type(found[name]).__name__ in page
