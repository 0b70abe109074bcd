"""DINOv2 ViT-L/14, the network behind published FD-DINOv2 values, from the transformers library.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024. Stein et al., "Exposing Flaws of
Generative Model Evaluation Metrics", NeurIPS 2023, compare its class tokens; Karras et al. (EDM2, CVPR 2024) follow
them. Images are resized to 224 pixels as Pillow does, and normalized by the statistics of ImageNet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.models.dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from distgan.errors import UserError
from distgan.evaluation.detectors.preprocessing import normalized, resized, rgb
from distgan.published_weights import HubFile, load_weights

PUBLISHED = HubFile("facebook/dinov2-large")
ARCHITECTURE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_SIZE, _PATCH = 224, 14
_TRAINED = 37
"""Patches per side that the position embeddings are for: 518 pixels."""
_OFFSET = 0.1
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_POSITIONS = "embeddings.position_embeddings"
_RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}
"""Names in the published file, and in newer versions of transformers."""


class DINOv2(nn.Module):
    """uint8 images (n, 1 or 3, H, W) -> the class token after the last norm (n, 1024), float32; no logits."""

    num_logits = 0

    def __init__(self, network: Dinov2Model) -> None:
        super().__init__()
        self.network, self.dimension = network, int(network.config.hidden_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = normalized(rgb(resized(images, _SIZE, _SIZE)), _MEAN, _DEVIATION)
        features = self.network(pixel_values=inputs).last_hidden_state[:, 0]
        return features, features.new_empty(len(features), 0)


def build(weights: dict[str, Tensor]) -> DINOv2:
    """Return the network. Raises UserError if the weights are those of another one."""
    # Plain matrix products, whose precision `ieee_float32` sets.
    config = Dinov2Config(**ARCHITECTURE, image_size=_SIZE, patch_size=_PATCH, attn_implementation="eager")
    with init_empty_weights():
        network = Dinov2Model(config)
    positions = weights.get(_POSITIONS, torch.empty(0))
    if positions.shape != (1, 1 + _TRAINED**2, config.hidden_size):
        raise UserError(
            f"not the weights of {PUBLISHED.address}: {_POSITIONS}: found shape {tuple(positions.shape)}, expected "
            f"{(1, 1 + _TRAINED**2, config.hidden_size)}"
        )
    if any("q_proj" in name for name, _ in network.named_parameters()):
        weights = {_renamed(name): tensor for name, tensor in weights.items()}
    load_weights(network, {**weights, _POSITIONS: resampled(positions)}, PUBLISHED.address)
    return DINOv2(network)


def resampled(positions: Tensor) -> Tensor:
    """Resample position embeddings (1, 1 + 37 * 37, d) to the 16 x 16 patches of 224 pixels: (1, 1 + 16 * 16, d).

    DINOv2's own code passes the factor (16 + 0.1) / 37 to the bicubic interpolation, and published values have it.
    transformers passes 16 / 37, which moves the points by up to 0.6 % of the side.
    """
    side = _SIZE // _PATCH
    grid = positions[:, 1:].float().unflatten(1, (_TRAINED, _TRAINED)).permute(0, 3, 1, 2)
    factor = (side + _OFFSET) / _TRAINED
    patches = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat((positions[:, :1].float(), patches), 1)


def _renamed(name: str) -> str:
    for published, newer in _RENAMED.items():
        name = name.replace(published, newer)
    return name
