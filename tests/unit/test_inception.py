"""Inception features against torch-fidelity's own, with random weights in the file that both read."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distgan import published_weights
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.detectors import inception
from distgan.evaluation.detectors.published import load_published
from distgan.evaluation.metrics.frechet import frechet_distance, make_reference
from distgan.evaluation.moments import Moments
from distgan.metrics import load_detector
from distgan.published_weights import PublishedFile
from tests.image_metrics import TensorImages
from tests.servers import free_port, range_server

torch_fidelity = pytest.importorskip("torch_fidelity")
Theirs = inception.FeatureExtractorInceptionV3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Weights that keep activations of order one through 48 layers."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    nothing = tmp_path_factory.mktemp("inception") / "nothing.pth"
    torch.save({}, nothing)
    with patch.object(Theirs, "load_state_dict"):
        network = Theirs("random", ["2048"], str(nothing))
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            deviation = (2 / module.weight[0].numel()) ** 0.5
            module.weight.copy_(deviation * torch.randn(module.weight.shape, generator=generator))
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    torch.save(network.state_dict(), path)
    yield str(path)
    path.unlink()


def load_inception(path: str | None, cache: Path, runtime: Runtime) -> tuple[torch.nn.Module, str]:
    detector = load_published("inception", path, cache, runtime)
    return detector.network, detector.hash


def noise(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_features_are_torch_fidelitys(weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = torch.get_rng_state()
    ours, sha256 = load_inception(weights, tmp_path, Runtime())
    assert torch.equal(torch.get_rng_state(), state)
    assert "not the published weights of detector inception" in caplog.text
    assert len(sha256) == 64
    theirs = Theirs("reference", ["2048", "logits_unbiased"], weights)
    images = noise(2, 3, 32)
    features, logits = ours(images)
    expected_features, expected_logits = theirs(images)
    assert torch.equal(features, expected_features)
    assert torch.equal(logits, expected_logits)
    assert features.std() > 0.01
    detector = load_detector("inception", weights=weights)
    assert (detector.name, detector.hash) == ("inception", sha256)
    assert torch.equal(detector(images).features, expected_features)
    gray = noise(1, 1, 32)
    assert torch.equal(ours(gray)[0], theirs(gray.repeat(1, 3, 1, 1))[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_distance_is_torch_fidelitys(weights: str, tmp_path: Path) -> None:
    real, made = noise(8, 3, 32), noise(8, 3, 32, seed=1) // 2
    network, _ = load_inception(weights, tmp_path, Runtime())
    sides = []
    for images in (real, made):
        moments = Moments(inception.Inception.dimension)
        for batch in images.split(4):
            moments.update(network(batch)[0])
        sides.append(moments.compute())
    theirs = torch_fidelity.calculate_metrics(
        input1=TensorImages(made), input2=TensorImages(real), fid=True, batch_size=4, cuda=False,
        verbose=False, cache=False, feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights,
        save_cpu_ram=True,
    )  # fmt: skip
    found = float(frechet_distance(make_reference(sides[0]), sides[1]))
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


class _Call:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code from the file was run",)


def test_weights_that_hold_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content in (pickle.dumps(_Call(), protocol=2), b"no weights", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot read PyTorch weights") as caught:
            load_inception(str(path), tmp_path, Runtime())
        assert "\n" not in str(caught.value)
    torch.save({"weights": _Call()}, path)
    with pytest.raises(UserError, match="cannot read PyTorch weights"):
        load_inception(str(path), tmp_path, Runtime())


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"layer.weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"weights\.pth: .*not the weights of .*Inception-v3") as caught:
        load_inception(str(path), tmp_path, Runtime())
    assert "\n" not in str(caught.value)
    torch.save([torch.ones(3)], path)
    with pytest.raises(UserError, match="more than named tensors"):
        load_inception(str(path), tmp_path, Runtime())
    with pytest.raises(UserError, match="No such file"):
        load_inception(str(tmp_path / "missing.pth"), tmp_path, Runtime())


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inception, "PUBLISHED", PublishedFile(f"http://127.0.0.1:{free_port()}/weights.pth", "6726825d")
    )
    with pytest.raises(
        UserError, match=r"\{detector: inception, weights: PATH\} .* evaluation.detector=classifier"
    ) as caught:
        load_inception(None, tmp_path / "cache", Runtime())
    assert "Connection refused" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("when", ["before the answer", "within the file"])
def test_a_silent_server_is_named_at_once_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    caplog.set_level(logging.INFO, "distgan")
    monkeypatch.setattr(published_weights, "_SILENCE_SECONDS", 0.3)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "weights.pth").write_bytes(bytes(5_000_000))
    with range_server(tmp_path / "served") as server:
        server.failures, server.failure = 1, "silence"
        server.delay = 2.0 if when == "before the answer" else 0.0
        url = f"{server.url}/weights.pth"
        monkeypatch.setattr(inception, "PUBLISHED", PublishedFile(url, "6726825d"))
        with pytest.raises(UserError, match=r"cannot download .* timed out; .*\{detector: inception, weights: PATH\}"):
            load_inception(None, tmp_path / "cache", Runtime())
    assert f"downloading the weights from {url} to {tmp_path}/cache/weights.pth" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_is_checked_and_kept(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with range_server(Path(weights).parent) as server:
        monkeypatch.setattr(inception, "PUBLISHED", PublishedFile(f"{server.url}/{Path(weights).name}", "6726825d"))
        with pytest.raises(UserError, match=r"cannot download .*: found SHA-256 \w{8}\.\.\., expected 6726825d"):
            load_inception(None, tmp_path / "cache", Runtime())
        assert list((tmp_path / "cache").iterdir()) == []
        found = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        monkeypatch.setattr(inception, "PUBLISHED", inception.PUBLISHED._replace(sha256=found[:8]))
        for _ in range(2):
            assert load_inception(None, tmp_path / "cache", Runtime())[1] == found
        assert len(server.gets) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(weights).name]
