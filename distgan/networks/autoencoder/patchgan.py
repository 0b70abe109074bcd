"""PatchGAN: a discriminator whose logits are each of a patch of the sample.

Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, section 3.2.2.
Settings are those of the released code and of Esser et al. 2021 (taming-transformers): convolutions of N(0, 0.02),
scales of batch norm of N(1, 0.02).
"""

from __future__ import annotations

from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.layers.normalization import build_normalization, centers_channels
from distgan.networks.layers.spectral_norm import add_spectral_norm
from distgan.networks.layers.virtual_batch_norm import add_reference
from distgan.networks.shape import SampleShape


class PatchGANDiscriminator(nn.Module):
    """Samples (n, C, R, R) to logits (n, h, w), such as (n, 30, 30) of 256 pixels, each of a patch of 70 pixels.

    4x4 convolutions with LeakyReLU of slope 0.2: `layers` of stride 2, then two of stride 1. All but the first and the
    last are normalized.

    Raises:
        UserError: there are labels, or the samples are too small for as many layers.
    """

    feature_layer = "features"
    judges_patches = True

    def __init__(
        self,
        shape: SampleShape,
        *,
        width: int = 64,
        layers: int = 3,
        normalization: str = "synchronized",
        reference_size: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if shape.num_classes:
            raise UserError(
                "discriminator.architecture: patchgan takes no labels, found data.labels = true; set data.labels=false"
            )
        if shape.resolution >> layers < 3:
            raise UserError(
                f"discriminator.layers = {layers}: data.resolution = {shape.resolution} leaves no patches, expected at "
                f"least {3 << layers}; lower it"
            )
        bias = not centers_channels(normalization)
        parts: list[nn.Module] = [nn.Conv2d(shape.channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = width
        for number in range(1, layers + 1):
            after, stride = width * min(2**number, 8), 2 if number < layers else 1
            parts += [
                nn.Conv2d(before, after, 4, stride, 1, bias=bias),
                build_normalization(normalization, after),
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.features = nn.Sequential(*parts)
        self.output = nn.Conv2d(before, 1, 4, 1, 1)
        for layer in (*self.features, self.output):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
        if spectral_norm:
            add_spectral_norm(self)
        add_reference(self, reference_size, shape.sizes, labeled=False)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.output(self.features(samples)).squeeze(1)
        return logits
