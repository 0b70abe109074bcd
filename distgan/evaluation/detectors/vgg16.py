"""VGG-16 with torchvision's weights: the features of precision and recall.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. Kynkäänniemi et
al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019, compare the outputs of its
second fully connected layer. Preprocessing is that of torch-fidelity, whose precision and recall use the same
features: bilinear to 224 pixels as in TensorFlow 1. The file of StyleGAN's code derives from the weights of the paper's
authors, not from torchvision's, so its values differ.
"""

from __future__ import annotations

from accelerate import init_empty_weights
from torch import Tensor, nn
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import VGG, vgg16  # type: ignore[import-untyped]

from distgan import published_weights
from distgan.evaluation.detectors.preprocessing import normalized, rgb
from distgan.published_weights import load_weights

PUBLISHED = published_weights.VGG16
_SIZE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG16(nn.Module):
    """uint8 images (n, 1 or 3, H, W) -> second fully connected layer after its ReLU (n, 4096), float32; no logits."""

    num_logits = 0

    def __init__(self, network: VGG) -> None:
        super().__init__()
        network.classifier = network.classifier[:5]  # the rest is dropout and the layer of the classes
        self.network, self.dimension = network, int(network.classifier[3].out_features)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scaled = interpolate_bilinear_2d_like_tensorflow1x(
            rgb(images).float(), size=(_SIZE, _SIZE), align_corners=False
        )
        features = self.network(normalized(scaled, _MEAN, _DEVIATION))
        return features, features.new_empty(len(features), 0)


def build(weights: dict[str, Tensor]) -> VGG16:
    """Return the network. Raises UserError if the weights are those of another one."""
    with init_empty_weights():
        network = vgg16(weights=None, init_weights=False)
    load_weights(network, weights, "torchvision's VGG-16")
    return VGG16(network)
