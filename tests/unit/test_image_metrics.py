"""Metrics of images: numbers, states, copies, collections and mistakes."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import FeatureShare

from distgan.errors import UserError
from distgan.metrics import FrechetDistance, InceptionScore, KernelDistance, load_detector
from tests.image_metrics import FAKES, REALS, SHAPE, Classifier, Network, detector, pair, update

ROOT = Path(__file__).parents[2]


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
    torch.testing.assert_close(torch.as_tensor(kept.compute()), torch.as_tensor(expected), rtol=1e-10, atol=0)
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
