"""DINOv2 ViT-L/14, the network behind published FD-DINOv2 values.

Stein et al., "Exposing Flaws of Generative Model Evaluation Metrics", NeurIPS 2023, compare its class tokens; Karras et
al. (EDM2, CVPR 2024) follow them. Images are resized to 224 pixels as Pillow does, and normalized by the statistics of
ImageNet.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from distgan.evaluation.detectors.preprocessing import normalized, resized, rgb
from distgan.losses.dinov2 import DEVIATION, MEAN, SIDE, dinov2_network
from distgan.published_weights import HubFile

PUBLISHED = HubFile("facebook/dinov2-large")
ARCHITECTURE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


class DINOv2(nn.Module):
    """uint8 images (n, 1 or 3, H, W) -> the class token after the last norm (n, 1024), float32; no logits."""

    num_logits = 0

    def __init__(self, network: Dinov2Model) -> None:
        super().__init__()
        self.network, self.dimension = network, int(network.config.hidden_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = normalized(rgb(resized(images, SIDE, SIDE)), MEAN, DEVIATION)
        features = self.network(pixel_values=inputs).last_hidden_state[:, 0]
        return features, features.new_empty(len(features), 0)


def build(weights: dict[str, Tensor]) -> DINOv2:
    """Return the network. Raises UserError if the weights are those of another one."""
    # Plain matrix products, whose precision `ieee_float32` sets.
    return DINOv2(dinov2_network(weights, ARCHITECTURE, PUBLISHED))
