"""LPIPS, a perceptual distance of images: version 0.1 with VGG16.

Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
2018.

The module is written here because the package `lpips` has had no release since 2021, and torchmetrics downloads weights
and keeps its network private. The tests compare it with the latter. Nothing is downloaded here, and nothing unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.files import reason

log = logging.getLogger("distgan")

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
"""Weights of torchvision's VGG16, trained on ImageNet, with which LPIPS was calibrated."""
SMALLEST = 16
"""Pixels per side below which the last layer has no pixels."""
_PUBLISHED_SHA256 = "397923af"
_MAX_BYTES = 1 << 30
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each resolution (Simonyan and Zisserman, ICLR 2015, table 1, D)."""


class LPIPS(nn.Module):
    """Distance (n,) of images in [-1, 1] and others, each (n, 1 or 3, H, W) of at least 16 pixels per side.

    The features f, g are those of relu1_2, 2_2, 3_3, 4_3 and 5_3, at each pixel divided by their norm. The distance is
    the sum over layers of the mean over pixels of sum_c w_c (f_c - g_c)^2, with the weights w >= 0 that fit human
    judgments (eq. 1). It has a gradient in both images; the weights have none. One channel stands for three equal ones.

    The names of the convolutions are those of torchvision.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in _WIDTHS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.register_buffer("linear", torch.zeros(sum(widths[-1] for widths in _WIDTHS)))
        # ImageNet's mean and deviation, for images in [-1, 1], with the digits of the released code.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.linear: Tensor
        self.shift: Tensor
        self.scale: Tensor
        self.requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        for given in (images, others):
            if given.shape[1] not in (1, 3) or min(given.shape[2:]) < SMALLEST:
                raise UserError(
                    f"LPIPS: found images of shape {tuple(given.shape)}, expected 1 or 3 channels and at least "
                    f"{SMALLEST} pixels per side"
                )
        weights = self.linear.split([widths[-1] for widths in _WIDTHS])
        layers = zip(self._layers(images), self._layers(others), weights, strict=True)
        parts = [((one - other).square() * weight[:, None, None]).sum(1).mean((1, 2)) for one, other, weight in layers]
        return torch.stack(parts).sum(0)

    def _layers(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the normalized features of each resolution; the gradient of a pixel without features is 0."""
        activations = (images - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield F.normalize(activations, eps=1e-10)
            activations = layer(activations)
        yield F.normalize(activations, eps=1e-10)


def load_lpips(weights: str | os.PathLike[str] | None = None) -> LPIPS:
    """Load LPIPS with the calibrated weights that torchmetrics comes with.

    Args:
        weights: file of VGG16's weights; see `vgg16_file`.

    Raises:
        UserError: the file is missing, cannot be read, or has the weights of another network.
    """
    path = vgg16_file(weights)
    found = _read(path, f"download {URL}")
    with torch.random.fork_rng(devices=[]):  # the weights that it begins with must not advance a training's generator
        network = LPIPS()
    wanted = network.state_dict()
    trunk = {name: tensor for name, tensor in found.items() if name.startswith("features.")}
    if {name: tensor.shape for name, tensor in trunk.items()} != {
        name: tensor.shape for name, tensor in wanted.items() if name != "linear"
    }:
        raise UserError(f"{path}: not the weights of torchvision's VGG16; download {URL}")
    calibrated = _read(_calibration_file(), "install torchmetrics again")
    linear = torch.cat([calibrated[f"lin{number}.model.1.weight"].flatten() for number in range(len(_WIDTHS))])
    network.load_state_dict({**trunk, "linear": linear})
    if path.suffix != ".safetensors" and not _sha256(path).startswith(_PUBLISHED_SHA256):
        log.warning("%s: not the published VGG16; compare distances only between runs with this file", path)
    return network


def vgg16_file(weights: str | os.PathLike[str] | None) -> Path:
    """Return the file of VGG16's weights: a .pth file, of which only tensors are read, or a .safetensors file.

    Args:
        weights: its path. None: that of torchvision's copy, `torch.hub.get_dir()/checkpoints/vgg16-397923af.pth`.

    Raises:
        UserError: it does not exist.
    """
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]).expanduser()
    if not path.is_file():
        raise UserError(f"VGG16 weights: {path}: no such file; download {URL} to it, or set weights to its path")
    return path


def _calibration_file() -> Path:
    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"


def _read(path: Path, fix: str) -> dict[str, Tensor]:
    """Read named tensors. Raises UserError, with the fix, if the file holds anything else."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"the file is larger than {_MAX_BYTES} bytes")
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError("the file holds more than named tensors")
        return found
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        said = reason(error).partition(". ")[0][:200]
        raise UserError(f"{path}: cannot read PyTorch weights: {said}; {fix}") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
