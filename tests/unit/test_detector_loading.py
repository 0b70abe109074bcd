"""Detectors without a run: Inception, a cached classifier by its path, a network of the user."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation import statistics_cache
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors import classifier
from distgan.evaluation.detectors.configured import load_configured_detector
from distgan.evaluation.detectors.features import evaluation_folder
from distgan.evaluation.detectors.preprocessing import rgb
from distgan.metrics import load_detector
from distgan.published_weights import PublishedFile
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index, refusal


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """The file of a classifier that an evaluation trained, and the detector that the evaluation uses."""
    monkeypatch.setattr(classifier, "_FEWEST_STEPS", 20)
    shards = write_shards(tmp_path / "shards", pictures(60))
    config = evaluation_config(shards, tmp_path / "cache")
    detector = load_configured_detector(
        config.evaluation.detector, EvaluationContext(config, build_index(shards), Runtime())
    )
    (file,) = evaluation_folder(config.evaluation).glob("classifier-*.safetensors")
    return file, detector


def test_a_cached_classifier_needs_its_path_only(cached: tuple[Path, Any]) -> None:
    file, expected = cached
    for source in (file, str(file)):
        found = load_detector(source)
        assert (found.name, found.dimension, found.num_logits) == ("classifier", 64, 3)
        assert found.image_shape == (1, 16, 16)
        assert found.hash == expected.hash
        for ours, theirs in zip(found(pictures(9)), expected(pictures(9)), strict=True):
            assert torch.equal(ours, theirs)
    said = refusal(found, pictures(2, size=32))
    assert said.startswith("images: found shape (1, 32, 32), expected (1, 16, 16)")
    assert refusal(found, pictures(2, channels=3)).startswith("images: found shape (3, 16, 16), expected (1, 16, 16)")


def rewritten(file: Path, **facts: Any) -> None:
    """The same weights with other facts; those that are None are left out."""
    entry = statistics_cache.parse(file.read_bytes())
    kept = {name: value for name, value in {**entry.facts, **facts}.items() if value is not None}
    statistics_cache.write(file, statistics_cache.Entry(entry.tensors, kept))


@pytest.mark.parametrize("missing", ["resolution", "channels", "num_classes"])
def test_a_classifier_without_its_shape_says_how_to_make_one(cached: tuple[Path, Any], missing: str) -> None:
    file, _ = cached
    rewritten(file, **{missing: None})
    said = refusal(load_detector, file)
    assert said.startswith(f"{file}: found no resolution, channels and num_classes")
    assert "remove the file and run `distgan evaluate RUN`" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 10**12), ("num_classes", 4), ("num_classes", "3"), ("channels", 10**12), ("channels", None),
        ("resolution", 2**40), ("resolution", 24), ("resolution", 0), ("resolution", "16"), ("resolution", 8),
        ("resolution", 16.0),
    ],
)  # fmt: skip
def test_metadata_that_is_not_the_weights_is_refused(cached: tuple[Path, Any], name: str, value: Any) -> None:
    """Before memory is taken for what it asks for."""
    file, _ = cached
    rewritten(file, **{name: value})
    said = refusal(load_detector, file)
    assert said.startswith(f"{file}: ")
    assert "distgan evaluate RUN" in said


class _Call:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code from the file was run",)


def test_other_files_are_refused_and_never_run(tmp_path: Path, cached: tuple[Path, Any]) -> None:
    path = tmp_path / "other.safetensors"
    other = {"a": torch.ones(3)}
    facts = {"facts": json.dumps({"resolution": 16, "channels": 1, "num_classes": 3}), "sha256": "0"}
    right = {**facts, "sha256": statistics_cache.digest(other)}
    torch.save(_Call(), tmp_path / "pickled")
    contents = {
        "damaged, or not": [
            pickle.dumps(_Call()), b"", b"\xff" * 20, cached[0].read_bytes()[:-1], (tmp_path / "pickled").read_bytes(),
            save(other), save(other, facts),
        ],
        "are not those of its metadata": [save(other, right)],
    }  # fmt: skip
    for words, files in contents.items():
        for content in files:
            path.write_bytes(content)
            said = refusal(load_detector, path)
            assert said.startswith(f"{path}: ")
            assert words in said
    assert "no such file" in refusal(load_detector, tmp_path / "none")
    assert "no such file" in refusal(load_detector, "classifier")
    assert "Is a directory" in refusal(load_detector, tmp_path)
    assert "found int" in refusal(load_detector, 5)
    assert "weights: only for" in refusal(lambda: load_detector(cached[0], weights="w"))


class Colors(nn.Module):
    """Mean and deviation of each channel: features (n, 2 C), scaled by a weight."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.register_buffer("offset", torch.zeros(()), persistent=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Any:
        moments = torch.cat((images.double().mean((2, 3)), images.double().std((2, 3))), 1)
        return self.dropout(moments * self.scale + self.offset).to(self.scale.dtype)


class Brightness(Colors):
    """The same, with logits."""

    def forward(self, images: Tensor) -> Any:
        features = super().forward(images)
        return features, features[:, :1]


def test_a_network_of_the_user_is_copied_and_frozen() -> None:
    network = Colors().train()
    found = load_detector(network)
    images = pictures(5, channels=3, size=8)
    expected = torch.cat((images.double().mean((2, 3)), images.double().std((2, 3))), 1)
    features, logits = found(images)
    assert (found.name, found.dimension, found.num_logits) == ("Colors", 6, 0)
    assert logits.shape == (5, 0)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected.float())
    assert network.training
    assert network.scale.requires_grad
    network.scale.data.fill_(7)
    assert torch.equal(found(images).features, features)
    both = load_detector(Brightness(), image_shape=(1, 8, 8))
    assert (both.dimension, both.num_logits) == (2, 1)
    assert load_detector(Colors().half())(images).features.dtype == torch.float32
    assert load_detector(Colors().bfloat16()).hash != found.hash


def test_the_hash_is_of_the_class_and_all_weights() -> None:
    def hash_of(network: nn.Module) -> str:
        return load_detector(network).hash

    offset = Colors()
    offset.offset.fill_(1)  # not in the state dict
    assert hash_of(Colors()) == hash_of(Colors().eval())
    assert len({hash_of(network) for network in (Colors(), Colors(2.0), Brightness(), offset)}) == 4


class _Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output(images)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda x: x.float(), "found output (torch.float32 (2, 3, 64, 64)) for 2 images, expected features (2, d)"),
        (lambda x: x.flatten(1), "found output (torch.uint8 (2, 12288))"),
        (lambda x: {"features": x}, "found output (dict)"),
        (lambda x: (x.flatten(1).float(),) * 3, "float32 (2, 12288), torch.float32 (2, 12288), torch.float32 (2"),
        (lambda x: x.flatten(1).float()[:1], "(torch.float32 (1, 12288)) for 2 images"),
        (lambda x: x.flatten(1).float()[:, :1], "found 1 features per image, expected at least 2"),
        (lambda x: x.flatten(1).float() @ torch.ones(768, 4), "(2, 3, 64, 64): mat1 and mat2 shapes cannot be"),
        (lambda x: nn.Conv2d(3, 4, 3)(x), "convert uint8 inside its forward method"),
    ],
)
def test_other_networks_are_refused_in_one_line(output: Any, words: str) -> None:
    said = refusal(load_detector, _Returns(output))
    assert "_Returns" in said
    assert words in said


def test_images_of_another_shape_than_it_was_tried_on() -> None:
    flat = load_detector(_Returns(lambda x: x.flatten(1).float()))
    said = refusal(flat, pictures(2, channels=3))
    assert "found 768 features and 0 logits" in said
    assert "expected 12288 and 0; pass image_shape=(3, 16, 16) to load_detector" in said


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with a small network in place of Inception."""
    pytest.importorskip("torch_fidelity")
    from distgan.evaluation.detectors import inception

    class Small(nn.Module):
        dimension, num_logits = 2048, 1008

        def __init__(self, weights: dict[str, Tensor]) -> None:
            super().__init__()
            self.register_buffer("weight", weights["weight"])

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            ones = torch.ones(len(images), 1)
            return ones.expand(-1, 2048), ones.expand(-1, 1008)

    monkeypatch.setattr(inception, "Inception", Small)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return inception


def test_inception_is_downloaded_once_by_all_processes_of_a_node(
    tmp_path: Path, inception: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.ERROR)
    source = tmp_path / "source.pth"
    torch.save({"weight": torch.ones(2)}, source)
    calls: list[str] = []

    def fetch(file: PublishedFile, to: Path) -> None:
        calls.append(file.address)
        to.write_bytes(source.read_bytes())

    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))
    found: list[Any] = []
    with patch.object(PublishedFile, "_fetch", fetch):
        threads = [threading.Thread(target=lambda: found.append(load_detector("inception"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(calls) == 1
    assert len(found) == 3
    assert len({detector.hash for detector in found}) == 1
    assert found[0](pictures(2)).features.shape == (2, 2048)
    assert load_detector("inception", weights=source).hash == found[0].hash
    assert list((tmp_path / "cache" / "evaluation").glob("*.pth"))
    with patch.object(PublishedFile, "_fetch", fetch):
        load_detector("inception", cache_dir=tmp_path / "elsewhere")
    assert len(calls) == 2


def test_inceptions_mistakes_name_the_arguments(
    tmp_path: Path, inception: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with patch.object(PublishedFile, "_fetch", side_effect=OSError("no route")):
        said = refusal(lambda: load_detector("inception", cache_dir=tmp_path))
    assert said.startswith('load_detector("inception"): cannot download')
    assert "set weights to its path, or pass a network of yours" in said
    (tmp_path / "weights").write_bytes(pickle.dumps(_Call(), protocol=2))
    said = refusal(lambda: load_detector("inception", weights=tmp_path / "weights"))
    assert said.startswith(f"weights = {tmp_path / 'weights'}: cannot read PyTorch weights")
    (tmp_path / "file").touch()
    said = refusal(lambda: load_detector("inception", cache_dir=tmp_path / "file"))
    assert said.startswith(str(tmp_path / "file"))
    with patch.dict("sys.modules", {"distgan.evaluation.detectors.inception": None}):
        monkeypatch.delattr("distgan.evaluation.detectors.inception")
        said = refusal(load_detector, "inception")
    assert "pip install torch-fidelity" in said


def test_published_detectors_take_gray_and_color_only() -> None:
    with pytest.raises(UserError, match="found 4 channels, expected 1 or 3"):
        rgb(pictures(1, channels=4))
