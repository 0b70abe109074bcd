"""Metrics with detectors and sample counts of their own, in one pass over the samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from distgan.config import Config, EvaluationConfig, MetricConfig, dump_config, parse_config
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation import real_statistics
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.samples import FeatureBatch, Reals, read_reals
from distgan.evaluation.suite import Evaluator
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index

REALS, FAKES = pictures(60), 255 - pictures(50)
BATCH = 16


class Halves(nn.Module):
    """Features (n, 2): the mean brightness of the upper and of the lower half."""

    images = 0

    def forward(self, images: Tensor) -> Tensor:
        type(self).images += len(images)
        return images.float().mean(1).unflatten(1, (2, -1)).mean((2, 3))


class Corner(nn.Module):
    """Features (n, 4): the pixels of a corner, times a factor."""

    images = 0

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        type(self).images += len(images)
        return images[:, 0, 4:6, 4:6].flatten(1).float() * self.factor


class Seen(Metric):
    """What a metric of a user's own is told and gets."""

    takes = ("features", "numbers")
    higher_is_better = True

    def __init__(self, context: EvaluationContext, reals: dict[str, Tensor]) -> None:
        super().__init__()
        self.context, self.reals = context, reals
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor) -> None:
        assert features.shape[1] == self.reals["rows"].shape[1]
        self.numbers.append(numbers)  # type: ignore[operator, union-attr]

    def compute(self) -> dict[str, int]:
        assert self.context.detector is not None
        found = torch.cat(self.numbers).tolist()  # type: ignore[arg-type]
        assert found == list(range(self.context.num_samples))
        return {"": len(found), "dimension": self.context.detector.dimension}


def generate(numbers: Tensor) -> Tensor:
    return FAKES[numbers % len(FAKES)]


def moments_distance(reals: Tensor, fakes: Tensor) -> float:
    """The Fréchet distance with a matrix root by numpy's eigenvalues."""
    a, b = reals.double().numpy(), fakes.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * root)


def test_each_metric_has_its_detector_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards", REALS)
    read: list[int] = []

    def counted(*arguments: Any) -> Iterator[Reals]:
        for batch in read_reals(*arguments):
            read.extend(batch.numbers.tolist())
            yield batch

    monkeypatch.setattr(real_statistics, "read_reals", counted)
    config = evaluation_config(
        shards, tmp_path / "cache", num_samples=20, batch_size=BATCH, detector=Halves,
        metrics=["fid", {"metric": "fid", "detector": Corner, "samples": 50}, {"metric": Seen, "detector": Corner}],
    )  # fmt: skip
    Halves.images = Corner.images = 0
    evaluator = Evaluator(config, build_index(shards), Runtime())
    assert sorted(read) == list(range(60)), "one pass over the real samples for both detectors"
    of_reals = Halves.images
    assert of_reals == Corner.images > 0
    assert sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").rglob("real*")) == [
        "real-Corner", "real-Halves", "real-features-Corner",
    ]  # fmt: skip
    values = evaluator(generate)
    assert Corner.images - of_reals == 4 * BATCH, "the features of a batch are computed once for both metrics"
    assert Halves.images - of_reals == 2 * BATCH, "and not of samples that no metric with this detector gets"
    halves, corner = Halves(), Corner()
    assert values == {
        "fid[Halves]": pytest.approx(moments_distance(halves(REALS), halves(FAKES[:20])), rel=1e-6),
        "fid[Corner]": pytest.approx(moments_distance(corner(REALS), corner(FAKES)), rel=1e-6),
        "Seen[Corner]": 20,
        "Seen_dimension[Corner]": 4,
    }
    assert evaluator(generate) == values


def test_two_of_one_detector_with_other_options(tmp_path: Path) -> None:
    """Two features that are ten times as large have a distance that is a hundred times as large."""
    shards = write_shards(tmp_path / "shards", REALS)
    tenfold = {"metric": "fid", "name": "tenfold", "detector": {"detector": Corner, "factor": 10}}
    config = evaluation_config(shards, tmp_path, num_samples=20, detector=Corner, metrics=["fid", tenfold])
    values = Evaluator(config, build_index(shards), Runtime())(generate)
    assert values["tenfold[Corner]"] == pytest.approx(100 * values["fid[Corner]"], rel=1e-6)
    with pytest.raises(UserError, match=r"fid\[Corner\] is named twice; .*name: fid-2"):
        evaluation_config(shards, tmp_path, detector=Corner, metrics=["fid", {**tenfold, "name": None}])


def test_first_keeps_the_lowest_numbers() -> None:
    rows = torch.arange(6.0)[:, None]
    batch = FeatureBatch(torch.tensor([1, 4, 7, 10]), *(rows[:4] for _ in range(4)))
    assert batch.first(7).numbers.tolist() == [1, 4]
    assert batch.first(8).features.flatten().tolist() == [0, 1, 2]
    assert batch.first(11) is batch


def config_of(**evaluation: Any) -> Config:
    data, training = {"path": "d", "resolution": 16}, {"steps": 1, "batch_size": 8}
    return parse_config({"run_dir": "r", "data": data, "training": training, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("alias", "metric", "detector"),
    [
        ("fid50k_full", "fid", "inception"), ("kid50k_full", "kid", "inception"),
        ("is50k", "inception_score", "inception"), ("pr50k3_full", "precision_recall", "vgg16"),
    ],
)  # fmt: skip
def test_an_alias_fixes_detector_and_samples(alias: str, metric: str, detector: str) -> None:
    config = config_of(metrics=["fid", alias], num_samples=1000)
    plain, found = config.metrics
    assert (plain.value_name, plain.samples) == ("fid[classifier]", 1000)
    assert (found.metric, found.value_name, found.samples) == (metric, f"{alias}[{detector}]", 50_000)
    assert config.generated_samples == 50_000
    assert [detector.label for detector in config.detectors] == ["classifier", detector]
    assert parse_config(config.model_dump(mode="json")) == config
    assert f"name: {alias}" in dump_config(config)


def test_an_alias_is_what_it_says() -> None:
    weights = {"detector": "inception", "weights": "w.pth"}
    (found,) = config_of(metrics=[{"metric": "fid50k_full", "detector": weights, "name": "mine"}]).metrics
    assert found.value_name == "mine[inception]"
    assert found.detector is not None
    assert found.detector.arguments == {"weights": "w.pth"}
    for changed, said in (
        ({"samples": 10}, "samples = 50000, found 10"),
        ({"detector": "classifier"}, "found classifier"),
    ):
        with pytest.raises(UserError, match=rf"fid50k_full has .*{said}; leave it out, or .*metric: fid"):
            config_of(metrics=[{"metric": "fid50k_full", **changed}])
    with pytest.raises(UserError, match="did you mean fid50k_full"):
        config_of(metrics=["fid50k-full"])


def test_a_name_alone_is_the_configured_detector_of_that_name() -> None:
    config = config_of(metrics=["fid50k_full"], detector={"detector": "inception", "weights": "w.pth"})
    assert [detector.arguments for detector in config.detectors] == [{"weights": "w.pth"}]


def test_a_detector_without_effect_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.metrics\.0\.detector: has no effect with metric: modes"):
        config_of(metrics=[{"metric": "modes", "detector": "inception"}])
    with pytest.raises(UserError, match=r"classes needs .*detector: classifier"):
        config_of(metrics=[{"metric": "classes", "detector": "inception"}])
    assert config_of(metrics=[{"metric": "classes", "detector": "classifier"}], detector="inception").detectors


def test_sections_are_written_as_short_as_they_were() -> None:
    written = EvaluationConfig(metrics=[MetricConfig(metric="fid"), MetricConfig(metric="kid", samples=5)])
    assert written.model_dump(mode="json")["metrics"] == ["fid", {"metric": "kid", "samples": 5}]
