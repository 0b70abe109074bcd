"""The classifier: it learns, it depends on the data alone, and training around it does not notice."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation import statistics_cache
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors import classifier
from distgan.evaluation.detectors.configured import load_configured_detector
from distgan.evaluation.detectors.features import evaluation_folder
from distgan.evaluation.precision import plain_float32
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index

CPU = torch.device("cpu")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "_FEWEST_STEPS", 40)


@pytest.mark.usefixtures("brief")
def test_tells_bars_apart_and_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", pictures(150))
    config = evaluation_config(shards, tmp_path / "cache")
    index, runtime = build_index(shards), Runtime()
    caplog.set_level(logging.INFO, "distgan")
    detector = load_configured_detector(config.evaluation.detector, EvaluationContext(config, index, runtime))
    features, logits = detector(pictures(9))
    assert features.shape == (9, detector.dimension)
    assert features.dtype == logits.dtype == torch.float32
    assert logits.argmax(1).tolist() == [0, 1, 2] * 3
    assert "held-out accuracy 100.0 %" in caplog.text

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "train_classifier", lambda *_: pytest.fail("trained again"))
        again = load_configured_detector(config.evaluation.detector, EvaluationContext(config, index, runtime))
    assert again.hash == detector.hash
    assert torch.equal(again(pictures(9)).features, features)

    (file,) = evaluation_folder(config.evaluation).iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    third = load_configured_detector(config.evaluation.detector, EvaluationContext(config, index, runtime))
    assert third.hash == detector.hash
    assert str(file) in caplog.text


@pytest.mark.usefixtures("brief")
def test_depends_on_the_data_alone_and_leaves_no_trace(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", pictures(60, channels=3))
    config, index = evaluation_config(shards, tmp_path, channels=3, resolution=32), build_index(shards)
    found = []
    threads = torch.get_num_threads()
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.set_num_threads(seed)
        state = torch.get_rng_state()
        with torch.no_grad():
            found.append(classifier.train_classifier(config.data, index, CPU))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == seed
    torch.set_num_threads(threads)
    assert statistics_cache.digest(found[0].tensors) == statistics_cache.digest(found[1].tensors)
    shape = {"resolution": 32, "channels": 3, "num_classes": 3}
    assert found[0].facts == found[1].facts == {**shape, "accuracy": found[0].facts["accuracy"], "held_out": 6}


def test_probabilities_fit_the_held_out_labels() -> None:
    """Logits that are four times too flat, of labels drawn from their softmax; then labels that never err."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    assert classifier.calibrate(true / 4, labels) == pytest.approx(4, rel=0.05)
    assert classifier.calibrate(true * 4, labels) == pytest.approx(1 / 4, rel=0.05)
    certain = torch.eye(2, dtype=torch.float64).repeat(50, 1)
    # The likeliest gap g of two classes has sigmoid(g) = 1 - e/2 when labels are taken for wrong at a rate of e/2.
    gap = torch.logit(torch.tensor(1 - 1 / 101 / 2, dtype=torch.float64))
    assert classifier.calibrate(certain, certain.argmax(1)) == pytest.approx(float(gap), rel=0.05)


@pytest.mark.parametrize("resolution", [4, 8, 16, 64, 256])
def test_any_resolution(resolution: int) -> None:
    network = classifier.build_classifier(resolution, 3, 5).eval()
    images = torch.full((2, 3, resolution, resolution), 200, dtype=torch.uint8)
    images[1, :, : resolution // 2] = 0
    features, logits = network(images)
    assert features.shape == (2, classifier.DIMENSION)
    assert logits.shape == (2, 5)
    assert not torch.allclose(features[0], features[1])


def test_needs_labels(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", pictures(6), labels=False)
    config = evaluation_config(shards, tmp_path)
    with pytest.raises(UserError, match=r"no labels.* set evaluation.detector=inception") as caught:
        load_configured_detector(config.evaluation.detector, EvaluationContext(config, build_index(shards), Runtime()))
    assert "\n" not in str(caught.value)


def test_needs_a_few_images(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", pictures(24), broken=frozenset(range(5)))
    config = evaluation_config(shards, tmp_path)
    with pytest.raises(UserError, match="19 readable images"):
        load_configured_detector(config.evaluation.detector, EvaluationContext(config, build_index(shards), Runtime()))


@pytest.mark.parametrize("tf32", [False, True])
def test_arithmetic_is_float32_inside_and_put_back(tf32: bool) -> None:
    """By both of torch's interfaces, of which the older one raises where the newer one has left a mixture."""
    backends = torch.backends
    names = "benchmark", "deterministic", "allow_tf32"

    def state() -> list[object]:
        precision = [part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]
        older = [backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()]
        return [*(getattr(backends.cudnn, name) for name in names), *precision, *older]

    def fail() -> None:
        with plain_float32(CPU):
            assert backends.cudnn.deterministic
            assert backends.cudnn.conv.fp32_precision == backends.cuda.matmul.fp32_precision == "ieee"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            raise ZeroDivisionError

    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    try:
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = tf32
        chosen = state()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ZeroDivisionError):
            fail()
        assert state() == chosen
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before


@pytest.mark.slow
def test_digits_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from distgan.data.packing.pack import pack

    pack("builtin:digits", str(tmp_path / "digits"))
    config = evaluation_config(str(tmp_path / "digits"), tmp_path, resolution=32)
    entry = classifier.train_classifier(config.data, build_index(str(tmp_path / "digits")), CPU)
    assert entry.facts["held_out"] == 179
    assert float(entry.facts["accuracy"]) > 0.97
