"""Precision, recall, density and coverage against hand calculations, prdc and torch-fidelity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from prdc import compute_prdc
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.metrics.density_coverage import DensityCoverage, ManifoldDensityCoverage
from distgan.evaluation.metrics.precision_recall import ManifoldPrecisionRecall, PrecisionRecall
from distgan.evaluation.numerics import neighbors

REALS, FAKES = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.4], [5.0]])


def values_of(metric: type[neighbors.NeighborMetric], reals: Tensor, fakes: Tensor, k: int) -> dict[str, float]:
    made = metric(reals, k, Runtime())
    for numbers in torch.arange(len(fakes)).flip(0).split(50):
        made.update(fakes[numbers], numbers)
    return {name: float(value) for name, value in made.compute().items()}


def precision_recall(reals: Tensor, fakes: Tensor, k: int = 3) -> dict[str, float]:
    return values_of(ManifoldPrecisionRecall, reals, fakes, k)


def density_coverage(reals: Tensor, fakes: Tensor, k: int = 5) -> dict[str, float]:
    return values_of(ManifoldDensityCoverage, reals, fakes, k)


def test_by_hand() -> None:
    """The radii of the reals are 1, 1, 2, so that 5 lies on the border of the closed ball of 3."""
    assert precision_recall(REALS, FAKES, 1) == {"precision": 1, "recall": 1}
    assert density_coverage(REALS, FAKES, 1) == {"density": 1, "coverage": pytest.approx(2 / 3, rel=1e-15)}


def clouds() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(230, 24, generator=draws), 0.9 * torch.randn(170, 24, generator=draws) + 0.3


def test_equal_to_prdc_and_torch_fidelity() -> None:
    reals, fakes = clouds()
    for k in (3, 5):
        # No two distances are equal here, so that open and closed balls hold the same.
        expected = compute_prdc(reals.numpy(), fakes.numpy(), k)
        found = precision_recall(reals, fakes, k) | density_coverage(reals, fakes, k)
        assert found == pytest.approx(expected, rel=1e-12)
        options: dict[str, Any] = {
            "prc_neighborhood": k,
            "prc_batch_size": 100,
            "save_cpu_ram": False,
            "verbose": False,
        }
        other = prc_features_to_metric(fakes, reals, **options)
        assert {name: found[name] for name in ("precision", "recall")} == pytest.approx(
            {name: other[name] for name in ("precision", "recall")}, rel=1e-6
        )
        assert min(found.values()) > 0.05
        assert max(found["precision"], found["recall"], found["coverage"]) < 0.99


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reals, fakes = clouds()
    expected = precision_recall(reals, fakes) | density_coverage(reals, fakes)
    monkeypatch.setattr(neighbors, "_ROWS", 7)
    monkeypatch.setattr(neighbors, "_COLUMNS", 50)
    assert precision_recall(reals, fakes) | density_coverage(reals, fakes) == expected
    radii = neighbors.kth_nearest(reals, 4, Runtime())
    np.testing.assert_allclose(
        radii, np.sort(np.square(reals.numpy()[:, None] - reals.numpy()).sum(2))[:, 4], rtol=1e-5
    )


@given(arrays(np.int8, st.tuples(st.integers(4, 12), st.integers(1, 3)), elements=st.integers(-9, 9)))
def test_reals_themselves_are_precise_and_recalled(points: np.ndarray[Any, Any]) -> None:
    """Even where several are the same point, whose ball has the radius 0."""
    rows = torch.from_numpy(points).float() * 1.1
    assert precision_recall(rows, rows) == {"precision": 1, "recall": 1}


def test_reals_themselves_in_another_order_have_density_one() -> None:
    """An open ball holds its center and k - 1 neighbors; the k-th, on its border, counts if rounding moves it."""
    reals, _ = clouds()
    order = torch.randperm(len(reals), generator=torch.Generator().manual_seed(1))
    assert density_coverage(reals, reals[order]) == {"density": 1, "coverage": 1}


def test_a_collapse_has_precision_without_recall() -> None:
    reals, _ = clouds()
    collapsed = reals[:1].expand(60, -1)
    assert precision_recall(reals, collapsed) == {"precision": 1, "recall": pytest.approx(1 / 230)}
    far = reals + 100
    assert precision_recall(reals, far) == {"precision": 0, "recall": 0}
    assert density_coverage(reals, far) == {"density": 0, "coverage": 0}


@pytest.mark.parametrize(
    ("metric", "reals", "fakes", "parts"),
    [
        (PrecisionRecall, 9, 3, ["found 3 generated and 9 real", "neighbors = 3", "evaluation.num_samples"]),
        (PrecisionRecall, 3, 9, ["found 9 generated and 3 real", "max_reals"]),
        (DensityCoverage, 6, 9, ["found 6 real", "neighbors + 1 = 6", "max_reals"]),
    ],
)
def test_too_few_samples_are_a_mistake(metric: Any, reals: int, fakes: int, parts: list[str]) -> None:
    context = SimpleNamespace(num_samples=fakes, runtime=None, name="value[detector]")
    with pytest.raises(UserError) as caught:
        metric(context, {"rows": torch.zeros(reals, 2)})
    assert all(part in str(caught.value) for part in ["value[detector]", *parts])
