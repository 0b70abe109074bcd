"""Inception-v3 of 2015, the network behind published FIDs, from torch-fidelity's port of the TensorFlow graph.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR 2016.
torch-fidelity also ports the graph's resizing to 299 pixels, so values match torch-fidelity's FID.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from distgan.errors import UserError
from distgan.evaluation.detectors.preprocessing import rgb
from distgan.published_weights import PublishedFile

PUBLISHED = PublishedFile(URL_INCEPTION_V3, "6726825d")


class Inception(nn.Module):
    """uint8 images (n, 1 or 3, H, W) -> features (n, 2048) and logits without bias (n, 1008), float32."""

    dimension = 2048
    num_logits = 1008

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Load the weights. Raises RuntimeError if they belong to another network."""
        super().__init__()
        # The extractor unpickles its file without limits, so it only gets a file that was written here from tensors.
        safe = io.BytesIO()
        torch.save(weights, safe)
        safe.seek(0)
        self.extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], safe)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.extractor(rgb(images))
        return features, logits


def build(weights: dict[str, Tensor]) -> Inception:
    """Return the network. Raises UserError if the weights are those of another one."""
    try:
        return Inception(weights)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"not the weights of torch-fidelity's Inception-v3: {said}; download {PUBLISHED.address}"
        ) from None
