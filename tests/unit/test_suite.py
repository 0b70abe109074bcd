"""Evaluation as a whole against numpy and scipy on the detector's features of all images at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torch_fidelity.metric_isc as torch_fidelity_isc
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distgan.config import Config, parse_config
from distgan.data.index.table import Index
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation import real_statistics
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors import classifier
from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.metrics import kid
from distgan.evaluation.metrics.frechet import FrechetDistanceToReference
from distgan.evaluation.metrics.inception_score import InceptionScoreOfLogits
from distgan.evaluation.metrics.kid import KernelDistanceToReference
from distgan.evaluation.names import criterion
from distgan.evaluation.numerics.subsets import draw_subsets
from distgan.evaluation.samples import Reals, pad_batch, rank_batches, read_reals
from distgan.evaluation.suite import Evaluator, evaluate
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index

REALS = pictures(150)


@pytest.fixture(autouse=True)
def _brief_training() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_FEWEST_STEPS", 30)
        yield


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return write_shards(tmp_path / "shards", REALS)


def generate(samples: Tensor) -> Tensor:
    """Real images with a stripe, by number."""
    images = REALS[samples % len(REALS)].clone()
    images[:, :, :, 3] = 255 - images[:, :, :, 3]
    return images


def distance_of(features: Tensor, others: Tensor) -> float:
    """The textbook formula, with a general matrix root."""
    a, b = features.double().numpy(), others.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


def test_equal_to_the_textbook_and_to_itself_in_other_batches(shards: str, tmp_path: Path) -> None:
    config, index = evaluation_config(shards, tmp_path / "cache", num_samples=149), build_index(shards)
    evaluator = Evaluator(config, index, Runtime())
    found = evaluator(generate)
    assert list(found) == ["fid[classifier]"]
    expected = distance_of(
        evaluator.detectors["classifier"](generate(torch.arange(149))).features,
        evaluator.detectors["classifier"](REALS).features,
    )
    assert found["fid[classifier]"] == pytest.approx(expected, rel=1e-5)
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": 50})})
    assert evaluate(generate, other, index, Runtime()) == pytest.approx(found, rel=1e-5)


def test_all_metrics_of_images_from_one_pass(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["kid", "fid", "classes", "inception_score"]
    config, index = evaluation_config(shards, tmp_path / "cache", num_samples=120, metrics=names), build_index(shards)
    read: list[int] = []

    def counted(*arguments: Any) -> Iterator[Reals]:
        for batch in read_reals(*arguments):
            read.extend(batch.numbers.tolist())
            yield batch

    monkeypatch.setattr(real_statistics, "read_reals", counted)
    evaluator = Evaluator(config, index, Runtime())
    assert sorted(read) == list(range(150))
    made: list[int] = []

    def counting(samples: Tensor) -> Tensor:
        made.append(len(samples))
        return generate(samples)

    found = evaluator(counting)
    assert len(made) == -(-120 // config.evaluation.batch_size)
    assert evaluator(generate) == found
    assert list(found) == [
        "kid[classifier]", "kid_std[classifier]", "fid[classifier]", "classes[classifier]",
        "classes_smallest_share[classifier]", "classes_kl[classifier]", "inception_score[classifier]",
        "inception_score_std[classifier]",
    ]  # fmt: skip
    features, logits = evaluator.detectors["classifier"](generate(torch.arange(120)))
    real_features = evaluator.detectors["classifier"](REALS).features
    assert found["fid[classifier]"] == pytest.approx(distance_of(features, real_features), rel=1e-5)
    score = torch_fidelity_isc.isc_features_to_metric(logits, shuffle=False)
    assert found["inception_score[classifier]"] == pytest.approx(score["inception_score_mean"], rel=1e-5)
    distance = KernelDistanceToReference(real_features, 120)
    distance.update(features, torch.arange(120))
    assert found["kid[classifier]"] == pytest.approx(float(distance.compute().mean), rel=1e-4)
    shares = torch.bincount(logits.argmax(1), minlength=3) / 120
    assert found["classes_smallest_share[classifier]"] == pytest.approx(float(shares.min()))
    assert found["classes_kl[classifier]"] == pytest.approx(float((shares * (3 * shares).log()).nansum()), abs=1e-6)


def test_kid_reads_the_reals_that_its_subsets_chose(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kid, "SUBSETS", 2)
    monkeypatch.setattr(kid, "SUBSET_SIZE", 20)
    monkeypatch.setattr(real_statistics, "MOST_ROWS", 5)
    config = evaluation_config(shards, tmp_path / "cache", num_samples=60, metrics=["kid"])
    evaluator = Evaluator(config, build_index(shards), Runtime())
    (entry,) = evaluator.reals.values()
    chosen = draw_subsets(len(REALS), 20, "kid/real subsets", 2).unique()
    assert entry.facts["samples"] == len(chosen) < 41
    assert torch.equal(entry.tensors["numbers"], chosen)
    (detector,) = evaluator.detectors.values()
    distance = KernelDistanceToReference(detector(REALS).features, 60)
    distance.update(detector(generate(torch.arange(60))).features, torch.arange(60))
    assert evaluator(generate)["kid[classifier]"] == pytest.approx(float(distance.compute().mean), rel=1e-4)


def test_points_need_no_detector(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three modes at (0, 0), (4, 0), (8, 0); the generator makes the first two, and one point between in three."""
    index = build_index(shards)
    data = {"path": shards, "kind": "points"}
    networks = {"generator": {"architecture": "mlp"}, "discriminator": {"architecture": "mlp"}}
    evaluation = {"cache_dir": str(tmp_path), "num_samples": 90, "batch_size": 7}
    config = parse_config(
        {
            "run_dir": "unused",
            "data": data,
            "training": {"steps": 1, "batch_size": 4},
            "evaluation": evaluation,
            **networks,
        }
    )
    noise = 0.05 * torch.randn(150, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(150) % 3

    def read(_data: object, _index: object, batches: Iterable[Tensor]) -> Iterator[Reals]:
        for numbers in batches:
            yield Reals(numbers, noise[numbers] + 4 * F.pad(labels[numbers, None], (0, 1)), labels[numbers])

    monkeypatch.setattr(real_statistics, "read_reals", read)

    def points(numbers: Tensor) -> Tensor:
        return F.pad(2.0 * (numbers % 3)[:, None], (0, 1))

    assert evaluate(points, config, index, Runtime()) == {"modes": 2, "modes_high_quality": pytest.approx(2 / 3)}
    assert len(list(tmp_path.rglob("real-modes-*.safetensors"))) == 1


def test_points_without_labels_have_no_modes(shards: str, tmp_path: Path) -> None:
    values = evaluation_config(shards, tmp_path).model_dump(mode="json")
    values["data"] = {"path": shards, "kind": "points"}
    values["evaluation"]["metrics"] = ["modes"]
    values["generator"] = values["discriminator"] = {"architecture": "mlp"}
    index = build_index(shards)
    index.num_classes = 0
    with pytest.raises(UserError, match=r"modes needs labels.*data\.path"):
        Evaluator(parse_config(values), index, Runtime())


@pytest.mark.parametrize("metric", ["kid", "inception_score"])
def test_too_few_samples_for_a_metric_are_a_mistake(shards: str, tmp_path: Path, metric: str) -> None:
    config = evaluation_config(shards, tmp_path / "cache", num_samples=3, metrics=[metric])
    with pytest.raises(UserError, match=rf"3.*remove {metric} from evaluation.metrics"):
        Evaluator(config, build_index(shards), Runtime())


def test_the_first_metric_decides_in_its_own_direction(shards: str, tmp_path: Path) -> None:
    for name, metric in {
        "fid": FrechetDistanceToReference,
        "kid": KernelDistanceToReference,
        "inception_score": InceptionScoreOfLogits,
    }.items():
        chosen = criterion(evaluation_config(shards, tmp_path, metrics=[name, "classes"]))
        assert chosen.name == f"{name}[classifier]"
        assert chosen.higher_is_better == metric.higher_is_better
        assert chosen.better(2.0, 1.0) == chosen.higher_is_better
        assert chosen.better(1.0, 2.0) != chosen.higher_is_better
        assert not chosen.better(1.0, 1.0)
        assert not chosen.better(math.nan, 1.0)


def test_the_reals_themselves_are_at_distance_zero(shards: str, tmp_path: Path) -> None:
    config = evaluation_config(shards, tmp_path / "cache", num_samples=len(REALS))
    assert evaluate(lambda samples: REALS[samples], config, build_index(shards), Runtime())["fid[classifier]"] < 1e-6


def test_reals_are_read_once(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, index = evaluation_config(shards, tmp_path / "cache"), build_index(shards)
    found = evaluate(generate, config, index, Runtime())
    with monkeypatch.context() as patch:
        patch.setattr(real_statistics, "read_reals", lambda *_: pytest.fail("read again"))
        assert evaluate(generate, config, index, Runtime()) == found
    (statistics,) = (tmp_path / "cache").rglob("real-*.safetensors")
    statistics.write_bytes(statistics.read_bytes()[:-1])
    assert evaluate(generate, config, index, Runtime()) == found
    assert f"{statistics}: the cached file is damaged" in caplog.text


def changed(config: Config, index: Index, what: str) -> tuple[Config, Index]:
    if what == "data":
        index.fingerprint = "another"
    elif what in ("resolution", "channels"):
        update = {"resolution": {"resolution": 8}, "channels": {"channels": 3}}[what]
        config = config.model_copy(update={"data": config.data.model_copy(update=update)})
    return config, index


class _Brightness(nn.Module):
    """Features of any images: mean and standard deviation."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.stack((images.float().mean((1, 2, 3)), images.float().std((1, 2, 3))), 1)
        return features, features


@pytest.mark.parametrize("what", ["data", "resolution", "channels", "detector"])
def test_statistics_of_something_else_are_not_taken(shards: str, tmp_path: Path, what: str) -> None:
    config, index, runtime = evaluation_config(shards, tmp_path), build_index(shards), Runtime()
    detector = Detector("classifier", 2, 2, "brightness", _Brightness())

    def statistics(config: Config, index: Index) -> dict[str, Tensor]:
        context = EvaluationContext(config, index, runtime, detector=detector)
        collectors = real_statistics.make_collectors((metric, context) for metric in config.metrics)
        return real_statistics.real_statistics(collectors, context)["fid[classifier]"].tensors

    first = statistics(config, index)
    pixels = REALS.float().flatten(1)
    np.testing.assert_allclose(first["mean"], torch.stack((pixels.mean(1), pixels.std(1))).double().mean(1), rtol=1e-6)
    if what == "detector":
        detector = Detector("classifier", 2, 2, "another", _Brightness())
    statistics(*changed(config, index, what))
    assert len(list(tmp_path.rglob("real-*.safetensors"))) == 2


def test_unreadable_reals_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = write_shards(tmp_path / "broken", REALS, broken=frozenset({7, 149}))
    config = evaluation_config(broken, tmp_path / "cache")
    with pytest.raises(UserError, match="2 of 150 samples cannot be read"):
        Evaluator(config, build_index(broken), Runtime())
    assert not list((tmp_path / "cache").rglob("real-*.safetensors"))
    tolerant = config.model_copy(update={"data": config.data.model_copy(update={"max_failure_rate": 0.1})})
    for _ in range(2):
        caplog.clear()
        evaluator = Evaluator(tolerant, build_index(broken), Runtime())
        assert "2 of 150" in caplog.text
    kept = [i for i in range(150) if i not in (7, 149)]
    features = evaluator.detectors["classifier"](REALS[kept]).features
    assert evaluator.reals["fid[classifier]"].facts["samples"] == 148
    np.testing.assert_allclose(evaluator.reals["fid[classifier]"].tensors["mean"], features.double().mean(0), atol=1e-5)


def test_too_few_samples_are_one_warning(shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = build_index(shards)
    for samples, warnings in ((classifier.DIMENSION + 1, 0), (classifier.DIMENSION, 1)):
        caplog.clear()
        evaluate(generate, evaluation_config(shards, tmp_path / "cache", num_samples=samples), index, Runtime())
        records = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(records) == warnings
    assert f"{classifier.DIMENSION} generated and 150 real" in records[0].getMessage()


def test_training_around_it_does_not_notice(shards: str, tmp_path: Path) -> None:
    config, index, runtime = evaluation_config(shards, tmp_path / "cache"), build_index(shards), Runtime()

    def state() -> list[object]:
        cudnn = torch.backends.cudnn
        numpy_state = np.random.get_state()
        return [
            torch.get_rng_state().tolist(), str(numpy_state), torch.get_num_threads(), torch.is_grad_enabled(),
            cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(),
        ]  # fmt: skip

    before = state()
    evaluate(generate, config, index, runtime)
    assert state() == before


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_the_samples(total: int, batch_size: int, world_size: int) -> None:
    found = []
    for rank in range(world_size):
        batches = list(rank_batches(total, batch_size, rank, world_size))
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        numbers = [int(i) for batch in batches for i in batch]
        assert all(i % world_size == rank for i in numbers)
        found += numbers
    assert sorted(found) == list(range(total))


def test_fill_repeats_rows() -> None:
    assert pad_batch(torch.tensor([5, 8, 6]), 8).tolist() == [5, 8, 6, 5, 8, 6, 5, 8]
    assert pad_batch(torch.tensor([5, 8]), 2).tolist() == [5, 8]
