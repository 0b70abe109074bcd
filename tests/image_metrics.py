"""Small networks and images for tests of metrics of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distgan.evaluation.detectors.features import Detector
from distgan.losses.lpips import LPIPS
from distgan.metrics import load_detector

SHAPE = (3, 16, 16)
FEATURES, CLASSES = 12, 5


class Network(nn.Module):
    """Random weights: features (n, 12) of uint8 images (n, 3, 16, 16)."""

    num_features = FEATURES

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(768, features, generator=generator) / 4)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return (images.flatten(1) / 127.5 - 1) @ self.get_buffer("weight")


class Classifier(Network):
    """Features (n, 12), and logits (n, 5)."""

    def forward(self, images: Tensor) -> Any:
        features = super().forward(images)
        return features, features[:, :CLASSES] / 2


class Logits(Classifier):
    """The logits alone, as torchmetrics takes them."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[1]


def pictures(count: int, seed: int) -> Tensor:
    """Noise with a random brightness for each image, darker with the seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 200, (count, *SHAPE), generator=generator)
    return (images + torch.randint(0, 56 - 8 * seed, (count, 1, 1, 1), generator=generator)).to(torch.uint8)


REALS, FAKES = pictures(130, 1), pictures(110, 2)


def detector() -> Detector:
    return load_detector(Classifier(), image_shape=SHAPE)


def update(metric: Any, batch: int = 40, **numbers: bool) -> Any:
    for images, real in ((REALS, True), (FAKES, False)):
        for part in images.split(batch):
            metric.update(part, real=real)
    return metric


def pair(result: Any) -> list[float]:
    return [float(value) for value in result]


class TensorImages(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def write_vgg16(path: Path) -> str:
    """Write random weights of VGG16, and return the path."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LPIPS()
        for weights in network.features.parameters():
            if weights.ndim == 4:
                nn.init.kaiming_normal_(weights)
        save_file({f"features.{name}": tensor for name, tensor in network.features.state_dict().items()}, path)
    return str(path)
