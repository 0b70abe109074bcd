"""LPIPS against torchmetrics' copy of the released code, with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS

from distgan.errors import UserError
from distgan.losses.lpips import LPIPS, load_lpips
from distgan.published_weights import VGG16, Wording

WORDING = Wording("ppl", "weights", "cache_dir", "remove it")


@pytest.fixture(scope="module")
def reference() -> Any:
    """Random VGG16, and the calibrated weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _LPIPS(net="vgg", pnet_rand=True).eval()


@pytest.fixture(scope="module")
def weights(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16's weights as torchvision publishes them: with a classifier, which is not read."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    trunk = {f"features.{name.partition('.')[2]}": tensor for name, tensor in reference.net.state_dict().items()}
    torch.save({**trunk, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="module")
def distance(weights: Path) -> LPIPS:
    return load(weights)


def load(path: Path) -> LPIPS:
    return load_lpips(VGG16.read(str(path), Path("unused"), WORDING).tensors)


def images(*shape: int) -> Tensor:
    return 2 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])) - 1


def test_values_and_gradients_are_those_of_the_released_code(reference: Any, distance: LPIPS) -> None:
    one, other = images(3, 3, 48, 32)
    for given in (one, other):
        given.requires_grad_()
    expected = reference(one, other).flatten()
    found = distance(one, other)
    assert found.shape == (3,)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(expected.sum(), (one, other))
    for gradient, own in zip(gradients, torch.autograd.grad(found.sum(), (one, other)), strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_it_is_a_distance(distance: LPIPS) -> None:
    one, other = images(2, 1, 16, 16)
    assert distance(one, one).tolist() == [0, 0]
    assert torch.equal(distance(one, other), distance(other, one))
    assert torch.equal(distance(one, other), distance(one.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)))
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_features_of_zero_have_a_finite_gradient(distance: LPIPS) -> None:
    """Where no ReLU is active the norm of the features has no derivative, which the released code makes NaN."""
    dark = torch.zeros(1, 3, 16, 16, requires_grad=True)
    silent = load_state(
        distance, {name: -torch.ones_like(t) for name, t in distance.named_parameters() if "bias" in name}
    )
    (gradient,) = torch.autograd.grad(silent(dark, torch.full_like(dark, 0.5)).sum(), dark)
    assert gradient.isfinite().all()


def load_state(distance: LPIPS, changed: dict[str, Tensor]) -> LPIPS:
    network = LPIPS()
    network.load_state_dict({**distance.state_dict(), **changed})
    return network


def test_the_random_generator_is_left_alone(weights: Path) -> None:
    before = torch.get_rng_state()
    load(weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_safetensors_hold_the_same(weights: Path, distance: LPIPS, tmp_path: Path) -> None:
    path = tmp_path / "vgg16.safetensors"
    save_file(torch.load(weights, weights_only=True), path)
    found = load(path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in distance.state_dict().items())


def test_weights_that_are_not_the_published_ones_are_a_warning(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(weights)
    assert f"{weights}: not the published weights of ppl" in caplog.text


class Harmful:
    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


def test_weights_of_other_networks(weights: Path) -> None:
    whole = torch.load(weights, weights_only=True)
    trunk = {name: tensor for name, tensor in whole.items() if name != "features.28.bias"}
    for content, said in (
        (trunk, "features.28.bias: found none"),
        ({**whole, "features.30.weight": torch.zeros(1)}, r"features.30.weight: found shape \(1,\), expected none"),
        ({**whole, "features.0.weight": torch.zeros(64, 1, 3, 3)}, "expected shape"),
    ):
        with pytest.raises(UserError, match=f"not the weights of torchvision's VGG16: .*{said}"):
            load_lpips(content)


def test_files_that_hold_something_else(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wrong.pth"
    for content in (Harmful(), [1]):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"wrong\.pth: cannot read PyTorch weights: .*https://") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=rf"{name}: cannot read"):
            load(tmp_path / name)


def test_images_that_do_not_fit(distance: LPIPS) -> None:
    for shape in ((1, 2, 16, 16), (1, 3, 15, 16)):
        with pytest.raises(UserError, match=r"found images of shape"):
            distance(torch.zeros(shape), torch.zeros(shape))
