"""FID-infinity and memorization-informed FID against hand calculations and their formulas in numpy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.mifid import _mifid_compute

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.metrics import fid_infinity, mifid
from distgan.evaluation.metrics.fid_infinity import FIDInfinity, intercept, sample_counts
from distgan.evaluation.metrics.frechet import make_reference
from distgan.evaluation.metrics.mifid import MiFID, nearest_cosine_distances
from distgan.evaluation.numerics.feature_rows import gaussian_of_rows
from distgan.evaluation.numerics.subsets import draw_subsets


def features_of(count: int, dimension: int, seed: int) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) * (1 + 0.1 * seed) + 0.2


def made(metric: Any, reals: Tensor, num_samples: int) -> Any:
    reference = make_reference(gaussian_of_rows(reals))
    given = {"mean": reference.mean, "factor": reference.factor, "samples": torch.tensor(len(reals)), "rows": reals}
    context = SimpleNamespace(num_samples=num_samples, runtime=Runtime(), name="value[detector]", index=reals)
    return metric(context, given)


def value_of(metric: Any, reals: Tensor, fakes: Tensor) -> Any:
    metric = made(metric, reals, len(fakes))
    for numbers in torch.arange(len(fakes)).flip(0).split(100):
        metric.update(fakes[numbers], numbers)
    return metric.compute()


def textbook(fakes: Tensor, reals: Tensor) -> float:
    a, b = fakes.double().numpy(), reals.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


def test_the_line_by_hand() -> None:
    """7 = 5 + 200 / 100 and 6 = 5 + 200 / 200."""
    assert float(intercept(torch.tensor([100, 200]), torch.tensor([7.0, 6.0]))) == pytest.approx(5, rel=1e-14)


@given(st.lists(st.integers(1, 10**6), min_size=3, unique=True), st.floats(-9, 9), st.floats(-9, 9))
def test_points_on_a_line_give_its_intercept(counts: list[int], at_zero: float, slope: float) -> None:
    counts_ = torch.tensor(counts)
    found = intercept(counts_, at_zero + slope / counts_.double())
    assert float(found) == pytest.approx(at_zero, abs=1e-5)


def test_numbers_of_samples() -> None:
    """The authors' code rounds numpy's linspace down."""
    for total, fewest in ((50_000, 5000), (10_000, 5000), (900, 450)):
        assert sample_counts(total) == np.linspace(fewest, total, 15).astype(int).tolist()


def test_equal_to_numpy_and_less_biased_than_fid() -> None:
    reals, fakes = features_of(4000, 6, 1), features_of(600, 6, 1)
    found = float(value_of(FIDInfinity, reals, fakes))
    counts = np.linspace(300, 600, 15).astype(int)
    subsets = [draw_subsets(600, int(n), f"fid_infinity/subset {p}", 1)[0] for p, n in enumerate(counts)]
    distances = [textbook(fakes[subset], reals) for subset in subsets]
    assert found == pytest.approx(np.polyfit(1 / counts, distances, 1)[1], abs=1e-9)
    assert abs(found) < textbook(fakes, reals) / 2


def test_memorization_by_hand() -> None:
    """Means (1/2, 1/2) and (1, 0), traces 1 and 0: FID = 1/2 + 1. Both fakes are a real image, at distance 0."""
    reals, fakes = torch.eye(2), torch.tensor([[1.0, 0.0]]).expand(2, 2)
    found = value_of(MiFID, reals, fakes)
    assert float(found["distance"]) == 0
    assert float(found[""]) == pytest.approx(1.5e14, rel=1e-12)
    # torchmetrics' mean over reals is 1/2, above the threshold: it reports FID.
    theirs = _mifid_compute(*_moments(reals), reals.double(), *_moments(fakes), fakes.double())
    assert float(theirs) == pytest.approx(1.5, rel=1e-6)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.double().mean(0), rows.double().T.cov()


def test_distances_equal_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes, reals = features_of(70, 5, 1), features_of(90, 5, 2)
    a, b = fakes.double().numpy(), reals.double().numpy()
    cosines = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    for size in (512, 16):
        monkeypatch.setattr(mifid, "_ROWS", size)
        monkeypatch.setattr(mifid, "_COLUMNS", 2 * size)
        found = nearest_cosine_distances(fakes, reals, Runtime())
        np.testing.assert_allclose(found, (1 - abs(cosines)).min(1), atol=1e-12)


def test_the_penalty_is_below_the_threshold_only() -> None:
    """Features far from the origin all point the same way, and are near; others are not."""
    reals = features_of(300, 12, 1)
    fakes = features_of(200, 12, 2)
    far = value_of(MiFID, reals, fakes)
    assert float(far["distance"]) > mifid.THRESHOLD
    assert float(far[""]) == pytest.approx(textbook(fakes, reals), rel=1e-9)
    near = value_of(MiFID, reals + 20, fakes + 20)
    assert 0 < float(near["distance"]) < mifid.THRESHOLD
    assert float(near[""]) == pytest.approx(textbook(fakes + 20, reals + 20) / float(near["distance"]), rel=1e-6)


def test_too_few_samples(caplog: pytest.LogCaptureFixture) -> None:
    reals = features_of(30, 4, 1)
    with pytest.raises(UserError, match=r"value\[detector\]: found 3 generated.*at least 4"):
        made(FIDInfinity, reals, 3)
    with pytest.raises(UserError, match=r"value\[detector\]: found 1 generated.*at least 2"):
        made(MiFID, reals, 1)
    made(FIDInfinity, reals, 8)
    assert "comparing 4 generated and 30 real images, expected more than 4" in caplog.text
    assert fid_infinity.POINTS == 15
