"""Small networks of the published detectors' architectures, with seeded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

SMALL = {
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "clip": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 16,
    },
}  # fmt: skip
"""Fewer and narrower layers than those of `ARCHITECTURE` in the detectors' modules."""


def small_vgg(**_: Any) -> Any:
    """VGG-16 with at most 8 channels and 64 features."""
    import torchvision  # takes seconds

    layers = torchvision.models.vgg.make_layers([4, "M", 8, "M", 8, "M", 8, "M", 8, "M"])
    network = torchvision.models.VGG(layers, num_classes=7, init_weights=False)
    widths = [network.classifier[place].in_features // 64 for place in (0, 3, 6)]
    for place, (width, wide) in zip(
        (0, 3, 6), ((8 * 49, widths[1]), (widths[1], widths[2]), (widths[2], 7)), strict=True
    ):
        network.classifier[place] = nn.Linear(width, wide)
    return network


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights with which activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return network.eval()


ALIGNED = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "mlp_ratio": 1}
"""DINOv2 ViT-B/14 with one narrow layer, in place of `BASE_ARCHITECTURE` in `losses.dinov2`."""


def save_aligned(folder: Path) -> Any:
    """Save seeded weights of this network as they are published, and return the network of the library."""
    import transformers

    network = transformers.Dinov2Model(transformers.Dinov2Config(**ALIGNED, image_size=518, patch_size=14))
    randomized(network).save_pretrained(folder)
    return network
