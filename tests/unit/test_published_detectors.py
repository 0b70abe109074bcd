"""DINOv2, CLIP and VGG-16 as detectors, with seeded weights, against independent ways from images to features."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.detectors import published
from distgan.evaluation.detectors.preprocessing import resized
from distgan.evaluation.metrics.frechet import frechet_distance, make_reference
from distgan.evaluation.moments import Moments
from distgan.evaluation.suite import Evaluator
from distgan.metrics import FrechetDistance, load_detector
from tests.detectors import SMALL, randomized, small_vgg
from tests.hub_server import Repository, hub_server
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index, refusal

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
from distgan.evaluation.detectors import clip, dinov2, vgg16  # noqa: E402
from distgan.losses import dinov2 as losses_dinov2  # noqa: E402

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of the libraries with fewer and narrower layers."""
    monkeypatch.setattr(dinov2, "ARCHITECTURE", SMALL["dinov2"])
    monkeypatch.setattr(clip, "ARCHITECTURE", SMALL["clip"])
    monkeypatch.setattr(vgg16, "vgg16", small_vgg)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights as they are published: those of DINOv2 for 518 pixels, CLIP with its text encoder, VGG-16 as a pickle."""
    folder = tmp_path_factory.mktemp("weights")
    config = transformers.Dinov2Config(**SMALL["dinov2"], image_size=518, patch_size=14)
    randomized(transformers.Dinov2Model(config)).save_pretrained(folder / "dinov2")
    vision = {**SMALL["clip"], "patch_size": 32}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    both = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=vision["projection_dim"])
    randomized(transformers.CLIPModel(both)).save_pretrained(folder / "clip")
    torch.save(randomized(small_vgg()).state_dict(), folder / "vgg16.pth")
    return {"dinov2": folder / "dinov2", "clip": folder / "clip", "vgg16": folder / "vgg16.pth"}


def noise(count: int, channels: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def pillow(image: Tensor) -> Image.Image:
    rgb = image.expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(rgb))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([0, 128, 255]))
def test_resizing_gives_pillows_bytes(size: int, wanted: int, threshold: int) -> None:
    image = noise(1, 3, size)
    image = image if threshold == 0 else 255 * (image < threshold).to(torch.uint8)
    expected = np.asarray(pillow(image[0]).resize((wanted, wanted), Image.Resampling.BICUBIC))
    assert np.array_equal(resized(image, wanted, wanted)[0].permute(1, 2, 0).numpy(), expected)


def cubic_rows(wanted: int, size: int, factor: float) -> Tensor:
    """Rows of torch's bicubic interpolation, a = -3/4, of `size` values at the points (i + 1/2) / factor - 1/2."""
    rows = torch.zeros(wanted, size, dtype=torch.float64)
    for i in range(wanted):
        point = (i + 0.5) / factor - 0.5
        for place in range(int(np.floor(point)) - 1, int(np.floor(point)) + 3):
            x = abs(point - place)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            rows[i, min(max(place, 0), size - 1)] += near if x <= 1 else far
    return rows


@pytest.mark.parametrize("channels", [1, 3])
def test_dinov2(weights: dict[str, Path], channels: int) -> None:
    """transformers' network after Pillow's resizing, with the positions at the points of DINOv2's own code."""
    state = torch.get_rng_state()
    detector = load_detector("dinov2", weights=weights["dinov2"])
    assert torch.equal(torch.get_rng_state(), state)
    assert (detector.name, detector.dimension, detector.num_logits) == ("dinov2", 32, 0)
    theirs = transformers.Dinov2Model.from_pretrained(weights["dinov2"], local_files_only=True).eval()
    positions = theirs.embeddings.position_embeddings.data
    rows = cubic_rows(16, 37, (16 + 0.1) / 37)
    grid = torch.einsum("ij,kl,jlc->ikc", rows, rows, positions[0, 1:].double().unflatten(0, (37, 37))).flatten(0, 1)
    theirs.embeddings.position_embeddings.data = torch.cat((positions[0, :1], grid.float()))[None]
    images = noise(2, channels, 48)
    small = [np.asarray(pillow(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    inputs = (torch.tensor(np.stack(small)).double() / 255 - torch.tensor(IMAGENET[0])) / torch.tensor(IMAGENET[1])
    with torch.no_grad():
        expected = theirs(pixel_values=inputs.permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(detector(images).features, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_clip(weights: dict[str, Path], channels: int) -> None:
    """transformers' network and its image processor, which uses Pillow."""
    detector = load_detector("clip", weights=weights["clip"] / "model.safetensors")
    assert (detector.name, detector.dimension, detector.num_logits) == ("clip", 16, 0)
    kept = transformers.CLIPVisionModelWithProjection.from_pretrained(weights["clip"], local_files_only=True).eval()
    processor = transformers.CLIPImageProcessorPil()
    images = noise(2, channels, 64)
    with torch.no_grad():
        inputs = processor([pillow(image) for image in images], return_tensors="pt").pixel_values
        expected = kept(pixel_values=inputs).image_embeds
    torch.testing.assert_close(detector(images).features, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05


def test_clip_cuts_out_the_center() -> None:
    image = torch.nn.functional.interpolate(noise(1, 3, 40).float(), (40, 60)).to(torch.uint8)
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(224, interpolation=torchvision.transforms.InterpolationMode.BICUBIC),
            torchvision.transforms.CenterCrop(224),
        ]
    )
    expected = np.asarray(transform(pillow(image[0])))
    assert np.array_equal(clip.cropped(image)[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_vgg16(weights: dict[str, Path], channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_vgg16")
    detector = load_detector("vgg16", weights=weights["vgg16"])
    monkeypatch.setattr(torchvision.models, "vgg16", small_vgg)
    theirs = extractor.FeatureExtractorVGG16("reference", ["fc2_relu"], str(weights["vgg16"]))
    images = noise(2, channels, 48)
    (expected,) = theirs(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(detector(images).features, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05
    assert (expected == 0).any()


def test_the_networks_have_their_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, without memory for them: DINOv2's positions are those of 224 in place of 518 pixels."""
    monkeypatch.undo()
    found = {}
    for module, loading in ((dinov2, losses_dinov2), (clip, clip), (vgg16, vgg16)):
        monkeypatch.setattr(loading, "load_weights", lambda *_: None)
        positions = {"embeddings.position_embeddings": torch.empty(1, 1370, 1024, device="meta")}
        network = module.build(positions if module is dinov2 else {})
        found[module.__name__.rpartition(".")[2]] = network.dimension, sum(p.numel() for p in network.parameters())
    assert found == {
        "dinov2": (1024, 304_368_640 - (1370 - 257) * 1024),
        "clip": (512, 87_849_216),
        "vgg16": (4096, 138_357_544 - 1000 * 4097),
    }


def refused(name: str, weights: Path) -> str:
    """The message of a call; that of an evaluation begins with the config's names."""
    said = refusal(lambda: load_detector(name, weights=weights))
    with pytest.raises(UserError) as caught:
        published.load_published(name, str(weights), weights.parent, Runtime())
    assert str(caught.value).replace(f"weights in {{detector: {name}, weights: PATH}}", "weights") == said
    return said


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_other_files_are_refused(tmp_path: Path, weights: dict[str, Path], name: str) -> None:
    whole = (weights[name] / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    assert refused(name, tmp_path / "none").startswith(
        f"weights = {tmp_path}/none: cannot read safetensors: No such file"
    )
    assert f"weights = {path}: cannot read safetensors: No such file" in refused(name, tmp_path), "a folder without it"
    for content in (whole[:-1], whole[:40], b"", b"no weights"):
        path.write_bytes(content)
        said = refused(name, path)
        assert said.startswith(f"weights = {path}: cannot read safetensors: ")
        assert f"hf download {published.implementation(name, published.in_call(name)).PUBLISHED.repository}" in said
    other = "clip" if name == "dinov2" else "dinov2"
    assert f"{weights[other]}: not the weights of hf://" in refused(name, weights[other])
    tensors = load_file(weights[name] / "model.safetensors")
    last = next(key for key in sorted(tensors) if "mlp.fc2.bias" in key and "text" not in key)
    for changed in ({**tensors, last: torch.zeros(3)}, {key: tensors[key] for key in tensors if key != last}):
        save_file(changed, path)
        assert "mlp.fc2.bias: found " in refused(name, path)
        assert ", expected shape (32,)" in refused(name, path)


def test_other_files_are_no_vgg16(tmp_path: Path, weights: dict[str, Path]) -> None:
    state = torch.load(weights["vgg16"], weights_only=True)
    torch.save({key: state[key] for key in state if key != "classifier.6.bias"}, tmp_path / "w.pth")
    said = refused("vgg16", tmp_path / "w.pth")
    assert said == (
        f"{tmp_path}/w.pth: not the weights of torchvision's VGG-16: classifier.6.bias: found none, expected shape (7,)"
    )
    save_file(state, tmp_path / "w.safetensors")
    assert load_detector("vgg16", weights=tmp_path / "w.safetensors").dimension == 64
    (tmp_path / "w.pth").write_bytes(weights["vgg16"].read_bytes()[:-9])
    assert "cannot read PyTorch weights" in refused("vgg16", tmp_path / "w.pth")


@pytest.mark.parametrize(("name", "package"), [("dinov2", "transformers"), ("clip", "transformers")])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"distgan.evaluation.detectors.{name}", None)
    said = refusal(load_detector, name)
    assert said.startswith(f'load_detector("{name}"): the package {package} is not installed; pip install {package}')


def test_weights_that_torchvision_downloaded_are_found(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    copy = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(weights["vgg16"].read_bytes())
    assert load_detector("vgg16", cache_dir=tmp_path / "none").hash == load_detector("vgg16", weights=copy).hash


def test_weights_come_from_the_hub_once(tmp_path: Path, weights: dict[str, Path]) -> None:
    with hub_server(tmp_path) as server:
        server.repositories["facebook/dinov2-large"] = repository = Repository()
        said = refusal(lambda: load_detector("clip", cache_dir=tmp_path))
        assert said.startswith('load_detector("clip"): cannot download hf://openai/clip-vit-base-patch32: ')
        assert "run `hf download openai/clip-vit-base-patch32 model.safetensors` on another machine" in said
        repository.commit({"model.safetensors": (weights["dinov2"] / "model.safetensors").read_bytes()})
        first = load_detector("dinov2", cache_dir=tmp_path)
        server.cut = 10  # a second download would fail
        assert load_detector("dinov2", cache_dir=tmp_path).hash == first.hash
    assert first.hash == load_detector("dinov2", weights=weights["dinov2"]).hash


def test_an_evaluation_with_three_detectors(tmp_path: Path, weights: dict[str, Path]) -> None:
    metrics = [
        {"metric": metric, "detector": {"detector": name, "weights": str(weights[name])}, "samples": samples}
        for name, metric, samples in (("dinov2", "fid", 40), ("clip", "fid", 21), ("vgg16", "kid", 40))
    ]
    config = evaluation_config(write_shards(tmp_path / "shards", pictures(40)), tmp_path / "cache", metrics=metrics)
    index = build_index(str(tmp_path / "shards"))
    found = Evaluator(config, index, Runtime())(lambda numbers: 255 - pictures(40)[numbers])
    assert list(found) == ["fid[dinov2]", "fid[clip]", "kid[vgg16]", "kid_std[vgg16]"]
    for name, samples in (("dinov2", 40), ("clip", 21)):
        metric = FrechetDistance(load_detector(name, weights=weights[name]))
        metric.update(pictures(40), real=True)
        metric.update(255 - pictures(40)[:samples], real=False)
        assert found[f"fid[{name}]"] == pytest.approx(float(metric.compute()), rel=1e-4)


def test_the_distance_divides_by_one_less() -> None:
    """{0, 2} to {1, 5}: means 1 and 3, variances 2 and 8, so 4 + 2 + 8 - 2 * 4 = 6. Dividing by n would give 5."""
    sides = [Moments(2), Moments(2)]
    for side, values in zip(sides, ([0.0, 2.0], [1.0, 5.0]), strict=True):
        side.update(torch.tensor([[value, 0.0] for value in values]))
    reference, other = (side.compute() for side in sides)
    assert float(frechet_distance(make_reference(reference), other)) == pytest.approx(6.0, abs=1e-12)
