"""CLIP ViT-B/32, the network behind published CLIP-FIDs, from the transformers library.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021. Kynkäänniemi et al.,
"The Role of ImageNet Classes in Fréchet Inception Distance", ICLR 2023, compare its projected image embeddings.
Preprocessing is that of clean-fid (Parmar et al., CVPR 2022): the shorter side is resized to 224 pixels as Pillow does,
and the center is cut out.
"""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.models.clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from distgan.evaluation.detectors.preprocessing import normalized, resized, rgb
from distgan.published_weights import HubFile, load_weights

PUBLISHED = HubFile("openai/clip-vit-base-patch32", ("vision_model.", "visual_projection."))
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 512,
}  # fmt: skip
_SIZE, _PATCH = 224, 32
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIP(nn.Module):
    """uint8 images (n, 1 or 3, H, W) -> projected image embeddings (n, 512), not normalized, float32; no logits."""

    num_logits = 0

    def __init__(self, network: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.network, self.dimension = network, int(network.config.projection_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = normalized(rgb(cropped(images)), _MEAN, _DEVIATION)
        features = self.network(pixel_values=inputs).image_embeds
        return features, features.new_empty(len(features), 0)


def cropped(images: Tensor) -> Tensor:
    """Resize the shorter side of uint8 images (n, C, H, W) to 224 pixels, and cut out the center, 224 x 224."""
    shorter = min(images.shape[2:])
    height, width = (_SIZE * side // shorter for side in images.shape[2:])
    top, left = round((height - _SIZE) / 2), round((width - _SIZE) / 2)
    return resized(images, height, width)[:, :, top : top + _SIZE, left : left + _SIZE]


def build(weights: dict[str, Tensor]) -> CLIP:
    """Return the network. Raises UserError if the weights are those of another one."""
    # Plain matrix products, whose precision `ieee_float32` sets.
    config = CLIPVisionConfig(
        **ARCHITECTURE, image_size=_SIZE, patch_size=_PATCH, hidden_act="quick_gelu", attn_implementation="eager"
    )
    with init_empty_weights():
        network = CLIPVisionModelWithProjection(config)
    saved = "vision_model.embeddings.position_ids"  # the numbers of the patches, by older versions of transformers
    load_weights(network, {name: weights[name] for name in weights if name != saved}, PUBLISHED.address)
    return CLIP(network)
