"""StackedMNIST: what is packed, the classifier of its channels, and the count of its modes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distgan.cli.parser import parse
from distgan.data.index.loading import load_index
from distgan.data.packing.pack import pack
from distgan.data.packing.sources.opening import open_source
from distgan.data.reader import read_samples
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors import classifier
from distgan.evaluation.detectors.configured import load_configured_detector
from distgan.evaluation.metrics.class_coverage import ClassSpread
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index
from tests.sources import one_line, png, write_idx, write_tree


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked") / "shards"
    pack("builtin:digits", folder, stack=1500, resolution=16, workers=1)
    return folder


def test_there_are_no_stacked_digits_without_digits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"builtin:stacked-mnist.* no MNIST images.*--stack"):
        pack("builtin:stacked-mnist", tmp_path / "shards")


def test_channels_are_digits_and_the_label_spells_them(tmp_path: Path) -> None:
    """Each digit of an idx pair is one gray value, so that a channel tells which image it is."""
    labels = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    path = write_idx(tmp_path / "images-idx3-ubyte.gz", np.arange(8)[:, None, None] * np.ones((1, 8, 8)))
    write_idx(tmp_path / "labels-idx1-ubyte.gz", labels)
    pack(path, tmp_path / "shards", stack=2000, workers=1)
    index = load_index(str(tmp_path / "shards"))
    data = evaluation_config("unused", tmp_path, channels=3, resolution=8).data
    images = read_samples(data, index, range(2000)).data.numpy()
    drawn = images[:, :, 0, 0].astype(int)
    assert (images == drawn[:, :, None, None]).all()
    assert np.array_equal(index.labels, labels[drawn] @ [100, 10, 1])
    assert (len(index), index.num_classes, index.class_names[42]) == (2000, 1000, "042")
    # 6,000 independent draws of 8: chi-squared with 7 degrees of freedom is below 24.3 at p = 0.001; pairs likewise.
    for counts, freedom in ((np.bincount(drawn.ravel()), 7), (np.bincount(drawn[:, 0] * 8 + drawn[:, 2]), 63)):
        expected = counts.sum() / (freedom + 1)
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_an_image_is_a_function_of_seed_and_number() -> None:
    few, many, other = (
        open_source("builtin:digits", stack=count, seed=seed) for count, seed in ((5, 1), (9, 1), (9, 2))
    )
    assert [few.names[i] for i in range(5)] == [many.names[i] for i in range(5)]
    assert np.array_equal(few.slots[4], many.slots[4])
    assert many.names[0] != other.names[0]
    first = int(few.names[0].split("digits[")[1].split("]")[0])
    assert few.labels[0] // 100 == load_digits().target[first]


def test_the_number_of_images_is_that_of_the_papers_unless_said() -> None:
    """Lin et al. 2018, section 4.2."""
    for words, count in ((["--stack"], 128_000), (["--stack", "5"], 5), ([], None)):
        assert parse(["pack", "train-images-idx3-ubyte.gz", "out", *words]).stack == count


def test_only_labeled_gray_digits_are_stacked(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "images-idx3-ubyte", np.zeros((2, 3, 3)))
    folder = write_tree(tmp_path / "tree", {"a/1.png": png(1)})
    for source, found in ((path, "no labels"), (folder, "image files"), ("builtin:ring", "points")):
        with pytest.raises(UserError, match=f"stack needs .*, found {found}; name MNIST's") as error:
            open_source(source, stack=5)
        assert str(source) in one_line(error)
    write_idx(tmp_path / "labels-idx1-ubyte", np.array([1, 10]))
    with pytest.raises(UserError, match="found label 10"):
        open_source(path, stack=5)
    for count in (0, 10**7 + 1):
        with pytest.raises(UserError, match=f"stack {count}: expected 1 to 10000000"):
            open_source("builtin:digits", stack=count)


def test_the_detector_judges_each_channel(stacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out digits are none of those trained on; joint logits are those of the channels; the classes are right."""
    fitted = []
    monkeypatch.setattr(
        classifier, "fit_classifier", lambda images, *rest, fit=classifier.fit_classifier: (
            fitted.append(images), fit(images, *rest))[1],
    )  # fmt: skip
    monkeypatch.setattr(classifier, "_FEWEST_STEPS", 150)
    monkeypatch.setattr(classifier, "_MOST_STEPS", 150)
    index = load_index(str(stacked))
    config = evaluation_config(str(stacked), tmp_path, channels=3, metrics=["stacked_mnist"])
    context = EvaluationContext(config, index, Runtime())
    (section,) = config.detectors
    detector = load_configured_detector(section, context)
    [digits] = fitted
    assert len(digits.flatten(1).unique(dim=0)) == len(digits) <= 1797

    samples = read_samples(config.data, index, range(200))
    features, logits = detector(samples.data)
    assert features.shape == (200, detector.dimension) == (200, 192)
    assert logits.logsumexp(1).numpy() == pytest.approx(0, abs=1e-4)
    assert (logits.argmax(1) == samples.labels).double().mean() > 0.85
    apart = detector(samples.data[:, [1, 2, 0]])
    turned = samples.labels // 10 % 10 * 100 + samples.labels % 10 * 10 + samples.labels // 100
    assert torch.allclose(apart.features, features.unflatten(1, (3, 64))[:, [1, 2, 0]].flatten(1), atol=1e-4)
    assert (apart.logits.argmax(1) == turned).double().mean() > 0.85


def test_the_detector_wants_a_thousand_classes_and_color(stacked: Path, tmp_path: Path) -> None:
    bars = write_shards(tmp_path / "bars", pictures(30))
    for path, channels, found in ((bars, 3, "found 3 classes"), (str(stacked), 1, "data.channels = 1")):
        config = evaluation_config(path, tmp_path, channels=channels, metrics=["stacked_mnist"])
        with pytest.raises(UserError, match=f"{found}.*expected 1000 classes and 3 channels; pack .*--stack") as error:
            load_configured_detector(config.detectors[0], EvaluationContext(config, build_index(path), Runtime()))
        one_line(error)


def test_one_sample_finds_a_mode() -> None:
    """Counts 2, 1, 1, 0 of four equal classes: 3 modes, KL = log 2 / 2 nats."""
    for min_samples, found in ((1, 3), (2, 1), (None, 3)):
        metric = ClassSpread(torch.full((4,), 5), min_samples)
        metric.update(torch.eye(4)[[0, 0, 1, 2]])
        assert int(metric.compute().found) == found
        assert float(metric.compute().kl) == pytest.approx(math.log(2) / 2)
    rare = ClassSpread(torch.full((2,), 5), 1)
    rare.update(torch.eye(2)[[0] * 30 + [1]])
    assert int(rare.compute().found) == 2
