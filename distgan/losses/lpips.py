"""LPIPS, a perceptual distance of images: version 0.1 with VGG16.

Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
2018.

The module is written here because the package `lpips` has had no release since 2021, and torchmetrics downloads weights
and keeps its network private. The tests compare it with the latter. VGG16 is `published_weights.VGG16`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.published_weights import load_weights, read_tensors

SMALLEST = 16
"""Pixels per side below which the last layer has no pixels."""
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


def load_lpips(weights: Mapping[str, Tensor]) -> LPIPS:
    """Return LPIPS with the calibrated weights that torchmetrics comes with.

    Args:
        weights: tensors of torchvision's VGG16; see `convolutions`.

    Raises:
        UserError: the weights are those of another network, or torchmetrics is damaged.
    """
    with torch.random.fork_rng(devices=[]):  # the weights that it begins with must not advance a training's generator
        network = LPIPS()
    path = _calibration_file()
    try:
        calibrated = read_tensors(path).tensors
    except ValueError as error:
        raise UserError(f"{path}: cannot read PyTorch weights: {error}; install torchmetrics again") from None
    linear = torch.cat([calibrated[f"lin{number}.model.1.weight"].flatten() for number in range(len(_WIDTHS))])
    load_weights(network, {**convolutions(weights), "linear": linear}, "torchvision's VGG16")
    return network


def convolutions(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of VGG16's convolutions: a ninth of its weights."""
    return {name: tensor for name, tensor in weights.items() if name.startswith("features.")}


def _calibration_file() -> Path:
    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
