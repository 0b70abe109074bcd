"""Metrics whose values are bitwise the same on any number of ranks, and metrics that compute on all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distgan.config import parse_config
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.metrics import mifid, sliced_wasserstein
from distgan.evaluation.numerics import neighbors
from distgan.evaluation.suite import Evaluator
from tests.labelled_shards import pictures, write_shards
from tests.ranks import RankPool
from tests.shards import build_index

PLUGINS = str(Path(__file__).parents[1] / "plugins")
METRICS = ["precision_recall", "density_coverage", "kid", "fid_infinity", "mifid", "sliced_wasserstein"]


REALS = pictures(150)


def generate(numbers: Tensor) -> Tensor:
    """Image i is a real one with noise, a function of i, that is strong for some."""
    noise = [torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(int(number))) for number in numbers]
    strength = 6.0 * (numbers % 7)[:, None, None, None]
    return (REALS[numbers % 40].float() + strength * torch.stack(noise)).clamp(0, 255).to(torch.uint8)


def with_a_white_one(numbers: Tensor) -> Tensor:
    images = generate(numbers)
    images[numbers == 5] = 255
    return images


def measured(
    shards: str,
    cache: str,
    metrics: list[str],
    folder: str = PLUGINS,
    num_samples: int = 61,
    detector: str = "lab.metrics:Means",
    generated: Callable[[Tensor], Tensor] = generate,
) -> dict[str, float] | str:
    for path in {PLUGINS, folder} - set(sys.path):
        sys.path.insert(0, path)
    config = parse_config(
        {
            "run_dir": "r",
            "data": {"path": shards, "resolution": 16, "channels": 1, "num_workers": 0},
            "training": {"steps": 1, "batch_size": 2},
            "evaluation": {
                "num_samples": num_samples, "batch_size": 8, "cache_dir": cache, "metrics": metrics,
                "detector": {"detector": detector, "cells": 4},
            },
        },
        trust=True,
    )  # fmt: skip
    # Several blocks of rows for each rank, the last ones with fewer; and few directions, because sorting takes long.
    with (
        patch.object(neighbors, "_ROWS", 9),
        patch.object(neighbors, "_COLUMNS", 70),
        patch.object(mifid, "_ROWS", 9),
        patch.object(sliced_wasserstein, "DIRECTIONS", 20),
    ):
        try:
            return Evaluator(config, build_index(shards), Runtime())(generated)
        except UserError as error:
            return str(error)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("metrics") / "shards", REALS)


def test_values_are_bitwise_those_of_one_rank(shards: str, tmp_path: Path, ranks: RankPool) -> None:
    ((alone),) = ranks.run(1, measured, shards, str(tmp_path / "1"), METRICS)
    assert isinstance(alone, dict)
    for name in ("precision_recall_precision", "precision_recall_recall", "density_coverage_coverage"):
        assert 0 < alone[f"{name}[Means]"] < 1, alone
    assert {name.partition("[")[0] for name in alone} >= {"kid", "kid_std", "fid_infinity", "mifid", "mifid_distance"}
    assert ranks.run(4, measured, shards, str(tmp_path / "1"), METRICS) == [alone] * 4
    (found, _) = ranks.run(2, measured, shards, str(tmp_path / "2"), METRICS)
    for name, value in alone.items():
        # These have the moments of the reals, which the ranks sum in another order.
        rounding = 1e-9 if name in ("fid_infinity[Means]", "mifid[Means]") else 0
        assert found[name] == pytest.approx(value, rel=rounding, abs=rounding), name


def test_more_ranks_than_samples(shards: str, tmp_path: Path, ranks: RankPool) -> None:
    """The last rank has no sample and no block of their distances."""
    metrics = ["density_coverage", "mifid", "sliced_wasserstein"]
    (alone,) = ranks.run(1, measured, shards, str(tmp_path), metrics, num_samples=2)
    assert isinstance(alone, dict)
    assert ranks.run(3, measured, shards, str(tmp_path), metrics, num_samples=2) == [alone] * 3


OWN = """
import torch
from torchmetrics import Metric
from distgan.errors import UserError

class Shared(Metric):
    computes_on_all_ranks = True
    higher_is_better = True
    takes = ("samples", "numbers")
    def __init__(self, context):
        super().__init__()
        self.runtime = context.runtime
        self.add_state("rows", [], dist_reduce_fx="cat")
    def update(self, images, numbers):
        self.rows.append(numbers)
    def compute(self):
        rows = self.rows if torch.is_tensor(self.rows) else torch.cat(self.rows)
        mine = rows[self.runtime.rank :: self.runtime.world_size]
        return {"rows": len(rows), "sum": self.runtime.all_reduce_sum(mine.sum())}

class Refuses(Shared):
    computes_on_all_ranks = False
    def compute(self):
        raise UserError("nothing to compare with")
"""


OVERFLOWING = """
from lab.metrics import Means

class Overflowing(Means):
    def forward(self, images):
        features = super().forward(images)
        return features / (features < 1)
"""


def test_features_that_are_not_finite_are_an_error_on_every_rank(shards: str, tmp_path: Path, ranks: RankPool) -> None:
    """Of one image, which one of the ranks has, and some subsets."""
    (tmp_path / "overflowing.py").write_text(OVERFLOWING)
    for metric in ("precision_recall", "density_coverage", "fid_infinity", "mifid"):
        options = [metric], str(tmp_path), 61, "overflowing:Overflowing", with_a_white_one
        for said in ranks.run(2, measured, shards, str(tmp_path / "cache"), *options):
            assert str(said).startswith(metric)
            assert "[Overflowing]: the detector gives 1 of 61 generated images features that are not finite" in said


def test_every_rank_computes_with_the_rows_of_all(shards: str, tmp_path: Path, ranks: RankPool) -> None:
    (tmp_path / "on_all_ranks.py").write_text(OWN)
    options = shards, str(tmp_path), ["on_all_ranks:Shared"], str(tmp_path)
    for world_size in (1, 3):
        for found in ranks.run(world_size, measured, *options):
            assert found == {"Shared_rows": 61, "Shared_sum": 61 * 30}


def test_no_rank_goes_on_to_the_collectives_of_the_next_metric(shards: str, tmp_path: Path, ranks: RankPool) -> None:
    (tmp_path / "on_one_rank.py").write_text(OWN)
    metrics = ["on_one_rank:Refuses", "on_one_rank:Shared"]
    for said in ranks.run(2, measured, shards, str(tmp_path), metrics, str(tmp_path)):
        assert "nothing to compare with" in said
