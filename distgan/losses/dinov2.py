"""DINOv2's vision transformers from the transformers library, for images of 224 pixels.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor
from transformers.models.dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from distgan.errors import UserError
from distgan.published_weights import HubFile, Weights, load_weights

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Statistics of ImageNet's channels, in [0, 1]."""
SIDE, PATCH = 224, 14
BASE = HubFile("facebook/dinov2-base")
BASE_ARCHITECTURE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
"""Of DINOv2 ViT-B/14."""
_TRAINED = 37
"""Patches per side that the position embeddings are for: 518 pixels."""
_OFFSET = 0.1
_POSITIONS = "embeddings.position_embeddings"
_RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}
"""Names in the published file, and in newer versions of transformers."""


def dinov2_network(
    weights: Mapping[str, Tensor], architecture: Mapping[str, Any], published: HubFile, *, attention: str = "eager"
) -> Dinov2Model:
    """Return the network, with weights as they are published.

    Args:
        architecture: `hidden_size`, `num_hidden_layers` and `num_attention_heads`.
        attention: `eager`, plain matrix products, or `sdpa`, fused kernels.

    Raises:
        UserError: the weights are those of another network.
    """
    config = Dinov2Config(**architecture, image_size=SIDE, patch_size=PATCH, attn_implementation=attention)
    with init_empty_weights():
        network = Dinov2Model(config)
    positions = weights.get(_POSITIONS, torch.empty(0))
    if positions.shape != (1, 1 + _TRAINED**2, config.hidden_size):
        raise UserError(
            f"not the weights of {published.address}: {_POSITIONS}: found shape {tuple(positions.shape)}, expected "
            f"{(1, 1 + _TRAINED**2, config.hidden_size)}"
        )
    if any("q_proj" in name for name, _ in network.named_parameters()):
        weights = {_renamed(name): tensor for name, tensor in weights.items()}
    load_weights(network, {**weights, _POSITIONS: resampled(positions)}, published.address)
    return network


def resampled(positions: Tensor) -> Tensor:
    """Resample position embeddings (1, 1 + 37 * 37, d) to the 16 x 16 patches of 224 pixels: (1, 1 + 16 * 16, d).

    DINOv2's own code passes the factor (16 + 0.1) / 37 to the bicubic interpolation, and published values have it.
    transformers passes 16 / 37, which moves the points by up to 0.6 % of the side.
    """
    side = SIDE // PATCH
    grid = positions[:, 1:].float().unflatten(1, (_TRAINED, _TRAINED)).permute(0, 3, 1, 2)
    factor = (side + _OFFSET) / _TRAINED
    patches = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat((positions[:, :1].float(), patches), 1)


class Teacher:
    """DINOv2 ViT-B/14, frozen, for `objective.alignment`. No module, so that an objective does not train or save it."""

    def __init__(self, weights: Weights) -> None:
        """Raises UserError if the weights are those of another network."""
        with torch.random.fork_rng(devices=[]):  # initial weights must not advance the generator of the training
            network = dinov2_network(weights.tensors, BASE_ARCHITECTURE, BASE, attention="sdpa")
        self._network, self.hash = network.requires_grad_(False).eval(), weights.sha256

    @staticmethod
    def inputs(images: Tensor) -> Tensor:
        """Resize images, uint8 (n, 1 or 3, H, H), to 224 pixels, and normalize them: float32 (n, 3, 224, 224)."""
        scaled = images.float() / 255
        if scaled.shape[-1] != SIDE:
            scaled = F.interpolate(scaled, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        # Filled on the device, because the host would wait for a copy to it.
        mean, deviation = (torch.cat([scaled.new_full((1, 1, 1), x) for x in part]) for part in (MEAN, DEVIATION))
        return (scaled - mean) / deviation

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the tokens after the last norm (n, 1 + 16 * 16, 768), the class token first."""
        tokens: Tensor = self._network.to(inputs.device)(pixel_values=inputs).last_hidden_state
        return tokens


def _renamed(name: str) -> str:
    for published, newer in _RENAMED.items():
        name = name.replace(published, newer)
    return name
