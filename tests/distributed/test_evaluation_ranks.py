"""Evaluation on real ranks: one all-reduce, and the same numbers however many there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distgan import randomness
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.detectors import classifier
from distgan.evaluation.detectors.published import load_published
from distgan.evaluation.metrics.frechet import FrechetDistanceToReference, make_reference
from distgan.evaluation.moments import Moments
from distgan.evaluation.suite import Evaluator
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.ranks import RankPool
from tests.shards import build_index

FEATURES = torch.randn(2, 90, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1.3])[:, None, None]


def reduced_distance() -> tuple[float, int, list[int]]:
    """The distance by the metrics as another trainer would use them, and the all-reduces it took."""
    runtime = Runtime()
    sizes: list[int] = []
    reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *arguments, **named)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("an all-gather was called")

    with (
        patch("torch.distributed.all_reduce", counted),
        patch("torch.distributed.all_gather", refused),
        patch("torch.distributed.all_gather_into_tensor", refused),
        patch("torch.distributed.all_gather_object", refused),
    ):
        moments = Moments(20)
        for row in FEATURES[0, runtime.rank :: runtime.world_size].split(7):
            moments.update(row)
        metric = FrechetDistanceToReference(make_reference(moments.compute()))
        metric.update(FEATURES[1, runtime.rank :: runtime.world_size])
        distance = float(metric.compute())
    return distance, metric.compute().ndim, sizes


def test_metrics_reduce_once_and_gather_nothing(ranks: RankPool) -> None:
    ((expected, _, _),) = ranks.run(1, reduced_distance)
    for world_size in (2, 3):
        for distance, dimensions, sizes in ranks.run(world_size, reduced_distance):
            assert distance == pytest.approx(expected, rel=1e-12)
            assert dimensions == 0
            assert sizes == [24 * 24, 24 * 24]  # 20 features and the count, in rows of whole cache lines


def generate(samples: Tensor) -> Tensor:
    """A fixed random network whose float32 sums depend on the kernels, rounded to bytes."""
    latents = randomness.normal(1, "latents", samples, (32, 4, 4))
    weights = [randomness.normal(1, f"weights {i}", torch.arange(size), (32, 3, 3)) for i, size in enumerate((32, 1))]
    hidden = F.conv2d(F.interpolate(latents, scale_factor=2), weights[0], padding=1).relu()
    images = F.conv2d(F.interpolate(hidden, scale_factor=2), weights[1], padding=1)
    return (images + 100).round().clamp(0, 255).to(torch.uint8)


METRICS = ["inception_score", "kid", "classes", "fid"]


def evaluation(shards: str, cache: Path, threads: int = 1) -> tuple[dict[str, float], str]:
    config = evaluation_config(shards, cache, num_samples=101, metrics=METRICS)
    torch.set_num_threads(threads)
    try:
        with patch.object(classifier, "_FEWEST_STEPS", 30):
            evaluator = Evaluator(config, build_index(shards), Runtime())
            return evaluator(generate), evaluator.detectors["classifier"].hash
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("evaluation") / "shards", pictures(83))


def test_values_do_not_depend_on_the_ranks(ranks: RankPool, shards: str, tmp_path: Path) -> None:
    ((expected, detector),) = ranks.run(1, evaluation, shards, tmp_path / "1", threads=2)
    assert expected["fid[classifier]"] > 1
    assert [name for name in expected if name.removesuffix("[classifier]") in METRICS] == [
        f"{name}[classifier]" for name in METRICS
    ]
    for world_size in (2, 3):
        for found, used in ranks.run(world_size, evaluation, shards, tmp_path / str(world_size)):
            assert used == detector
            assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_a_cache_is_shared_by_any_number_of_ranks(ranks: RankPool, shards: str, tmp_path: Path) -> None:
    one = ranks.run(2, evaluation, shards, tmp_path)
    with patch.object(classifier, "train_classifier", lambda *_: pytest.fail("trained again")):
        other = evaluation(shards, tmp_path)
    assert one[0] == one[1]
    assert other[0] == pytest.approx(one[0][0], rel=1e-9, abs=0)


def gathered() -> list[list[int]]:
    """Rows (r, 0), (r, 1), ... of rank r: none of rank 0, two of rank 1, one of rank 2."""
    runtime = Runtime()
    count = (0, 2, 1)[runtime.rank]
    rows = torch.tensor([[runtime.rank, i] for i in range(count)]) if count else torch.empty(0)
    found: list[list[int]] = runtime.gather_rows(rows).tolist()
    return found


def test_rows_are_gathered_in_order_of_rank(ranks: RankPool) -> None:
    assert ranks.run(3, gathered) == [[[1, 0], [1, 1], [2, 0]], [[1, 0], [1, 1]], [[2, 0]]]


def single_image(shards: str, cache: Path) -> str:
    with patch.object(classifier, "_FEWEST_STEPS", 3):
        evaluator = Evaluator(evaluation_config(shards, cache, num_samples=1), build_index(shards), Runtime())
    with pytest.raises(UserError) as caught:
        evaluator(generate)
    return str(caught.value)


def test_no_rank_waits_for_a_distance_that_cannot_be(ranks: RankPool, shards: str, tmp_path: Path) -> None:
    for message in ranks.run(2, single_image, shards, tmp_path):
        assert "covariance: found 1 samples of one side, expected at least 2" in message


def missing_weights(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_published("inception", str(folder / "missing.pth"), folder, Runtime())
    return str(caught.value)


def test_no_rank_waits_for_weights_that_are_missing(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(2, missing_weights, tmp_path):
        assert "missing.pth: cannot read PyTorch weights: No such file" in message
