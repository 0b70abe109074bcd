"""Options of the built-in networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distgan.config.architectures.facts import (
    BatchNormOptions,
    ComparingOptions,
    Depth,
    GroupingOptions,
    MinibatchDiscriminationConfig,
    MinibatchStddevConfig,
    NetworkOptions,
    Normalization,
    NormalizedOptions,
)
from distgan.config.fields import Fraction, Size
from distgan.config.named import BuiltIn

__all__ = [
    "DISCRIMINATORS",
    "GENERATORS",
    "GroupingOptions",
    "MinibatchDiscriminationConfig",
    "MinibatchStddevConfig",
    "NetworkOptions",
    "Normalization",
]


class DCGANOptions(NormalizedOptions):
    """Strided convolutions (Radford et al. 2016), for images of 16 to 256 pixels."""

    kinds = ("images",)
    power_of_two = True

    width: Size = 64
    """Channels of the layer next to the images; they double toward the latents (or the logit) up to `max_width`."""
    max_width: Size = 1024
    """Largest number of channels of a layer."""


class DCGANDiscriminatorOptions(ComparingOptions, GroupingOptions, DCGANOptions):
    """Strided convolutions (Radford et al. 2016), for images of 16 to 256 pixels."""


class ResNetOptions(NormalizedOptions):
    """Residual networks of WGAN-GP and SNGAN, for images of 32 to 256 pixels."""

    kinds = ("images",)
    power_of_two = True

    width: Size = 64
    """Channels throughout at 32 pixels (128 in WGAN-GP, 256 and 128 in SNGAN). Larger images multiply it by SNGAN's
    table, with 64 there."""
    max_width: Size | None = None
    """Largest number of channels of a layer; null: 16 times `width`, the largest of SNGAN's table."""


class ResNetDiscriminatorOptions(ResNetOptions):
    """Residual networks of WGAN-GP and SNGAN, for images of 32 to 256 pixels."""

    pooling: Literal["sum", "mean"] = "sum"
    """Pooling before the logit: `sum` (SNGAN) or `mean` (WGAN-GP)."""


class BigGANOptions(NetworkOptions):
    """Residual networks of BigGAN (Brock et al. 2019), for images of 32 to 256 pixels. They have spectral norm."""

    kinds = ("images",)
    power_of_two = True

    width: Size = 64
    """ch in the paper, 96 there: its tables multiply it by 1 to 16. At 32 pixels all layers have 4 times as many
    channels."""
    attention: tuple[Size, ...] = ()
    """Sizes in pixels of the feature maps with self-attention: `[64]` in the paper. They need 8 channels or more."""
    initialization: Literal["orthogonal", "normal"] = "orthogonal"
    """Initial weights: `orthogonal` matrices, or `normal` of N(0, 0.02)."""


class BigGANGeneratorOptions(BigGANOptions, BatchNormOptions):
    """Residual networks of BigGAN (Brock et al. 2019), for images of 32 to 256 pixels. They have spectral norm."""

    shared_size: Size | None = None
    """Length of one class embedding that all scales and offsets are linear functions of, 128 in the paper. null: tables
    of scales and offsets by class for each norm."""
    hierarchical: bool = False
    """Split the latent evenly: one part for the first layer, and one for the norms of each block."""
    normalization: Literal["synchronized", "batch"] = "synchronized"
    """Normalization: `synchronized` batch norm over all ranks, or `batch` norm over each rank alone."""


class BigGANDiscriminatorOptions(BigGANOptions):
    """Residual networks of BigGAN (Brock et al. 2019), for images of 32 to 256 pixels. They have spectral norm."""

    @property
    def bounds_slope(self) -> bool:
        return not self.attention  # whose slope grows with the activations


class ProgressiveOptions(NetworkOptions):
    """Growing networks with an equalized learning rate (Karras et al. 2018)."""

    kinds = ("images",)
    power_of_two = True
    grows = True

    width: Size = 64
    """Channels of the layer next to the images; they double toward the latents (or the logit) up to `max_width`."""
    max_width: Size = 1024
    """Largest number of channels of a layer."""
    normalization: Literal["none"] = "none"
    """Always `none`: the generator has pixel norm, and both networks an equalized learning rate."""


class ProgressiveDiscriminatorOptions(GroupingOptions, ProgressiveOptions):
    """Growing networks with an equalized learning rate (Karras et al. 2018)."""


class R3GANOptions(NetworkOptions):
    """Residual networks of R3GAN (Huang et al. 2024), for images of 8 pixels and more."""

    kinds = ("images", "latents")
    power_of_two = True
    has_stages = True

    width: Size = 64
    """Channels of the layer next to the images; they double toward the latents (or the logit) up to `max_width`.
    Twice each is a multiple of `group_width`."""
    max_width: Size = 1024
    """Largest number of channels of a layer."""
    depth: Depth = 2
    """Number of residual blocks per stage."""
    group_width: Size = 16
    """Channels per group of the 3x3 convolutions, which have twice the channels of their stage. The released presets
    have 16, and 32 for ImageNet."""
    normalization: Literal["none"] = "none"
    """Always `none`: the networks have no normalization."""


class StyleGAN2Options(NetworkOptions):
    """Style-based networks (Karras et al. 2020), for images of 4 pixels and more."""

    kinds = ("images",)
    power_of_two = True

    width: Size = 64
    """Channels of the layer next to the images; they double toward the latents (or the logit) up to `max_width`."""
    max_width: Size = 512
    """Largest number of channels of a layer."""


class StyleGAN2GeneratorOptions(StyleGAN2Options):
    """Style-based networks (Karras et al. 2020), for images of 4 pixels and more."""

    style_size: Size = 512
    """Length of a style, the output of the mapping network."""
    mapping_layers: Annotated[Size, Field(le=64)] = 8
    """Number of layers of the mapping network."""
    style_mixing: Fraction = 0.9
    """Probability that, in training, a sample has the style of a second latent from a random layer on. Latents must be
    `normal` then."""

    @property
    def latent_distribution(self) -> str | None:
        return "normal" if self.style_mixing else None


class StyleGAN2DiscriminatorOptions(GroupingOptions, StyleGAN2Options):
    """Style-based networks (Karras et al. 2020), for images of 4 pixels and more."""

    residual: bool = True
    """Residual connections around each pair of convolutions; the released preset for CIFAR-10 has none."""


class GATOptions(NetworkOptions):
    """Transformers over patches (Hyun et al. 2026), for latents and for images."""

    kinds = ("images", "latents")
    has_stages = True
    levels = 4

    patch_size: Size = 2
    """Side of a patch in pixels, or in elements of a latent."""
    width: Size = 768
    """Length of a token: a multiple of 4 `heads`."""
    depth: Depth = 12
    """Number of blocks: a multiple of 4."""
    heads: Size = 12
    """Number of attention heads."""


class GATDiscriminatorOptions(GATOptions):
    """Transformers over patches (Hyun et al. 2026), for latents and for images."""

    projection_size: Size = 2048
    """Length of the vectors of sample and label whose product is the logit."""
    alignment_size: Size | None = None
    """Length of the vectors that a projector makes of tokens, filled in with 768 by `objective.alignment`. null: no
    projector."""


class AutoencoderOptions(NetworkOptions):
    """Convolutional autoencoder with a posterior (Rombach et al. 2022), for images. It needs
    `objective.reconstruction`, and `latent_size` is the number of elements of a latent: channels times side squared."""

    kinds = ("images",)
    reconstructs = True

    width: Size = 64
    """Channels of the layer next to the images; they double toward the latents up to `max_width`."""
    max_width: Size = 512
    """Largest number of channels of a layer."""
    depth: Depth = 2
    """Number of residual blocks per stage."""
    downsampling: Size = 8
    """Side of an image over the side of its latent: a power of two."""


class PatchGANOptions(NormalizedOptions):
    """Logits of patches (Isola et al. 2017), for images and latents, without labels."""

    kinds = ("images", "latents")
    judges_patches = True

    width: Size = 64
    """Channels of the first convolution; they double up to 8 times as many."""
    layers: Annotated[Size, Field(le=16)] = 3
    """Number of convolutions that halve the size. With 3, a patch has 70 pixels per side; with 2, 34; with 1, 16."""


class CharactersOptions(NetworkOptions):
    """Residual convolutions over characters (Gulrajani et al. 2017), for text."""

    kinds = ("text",)

    width: Size = 64
    """Channels of all layers."""
    depth: Depth = 5
    """Number of residual blocks."""
    normalization: Literal["none"] = "none"
    """Always `none`: the networks have no normalization."""
    spectral_norm: bool = False
    """Divide each weight matrix by its largest singular value (Miyato et al. 2018)."""

    @property
    def bounds_slope(self) -> bool:
        return self.spectral_norm


class MLPOptions(NormalizedOptions):
    """Dense networks, for points."""

    kinds = ("points",)

    width: Size = 64
    """Units of all hidden layers."""
    depth: Depth = 3
    """Number of hidden layers."""


class MLPDiscriminatorOptions(ComparingOptions, MLPOptions):
    """Dense networks, for points."""


GENERATORS = {
    "dcgan": BuiltIn("distgan.networks.dcgan:DCGANGenerator", DCGANOptions),
    "resnet": BuiltIn("distgan.networks.resnet:ResNetGenerator", ResNetOptions),
    "biggan": BuiltIn("distgan.networks.biggan:BigGANGenerator", BigGANGeneratorOptions),
    "progressive": BuiltIn("distgan.networks.progressive:ProgressiveGenerator", ProgressiveOptions),
    "r3gan": BuiltIn("distgan.networks.r3gan:R3GANGenerator", R3GANOptions),
    "stylegan2": BuiltIn("distgan.networks.stylegan2.generator:StyleGAN2Generator", StyleGAN2GeneratorOptions),
    "gat": BuiltIn("distgan.networks.gat.generator:GATGenerator", GATOptions),
    "autoencoder": BuiltIn("distgan.networks.autoencoder.network:Autoencoder", AutoencoderOptions),
    "characters": BuiltIn("distgan.networks.characters:CharacterGenerator", CharactersOptions),
    "mlp": BuiltIn("distgan.networks.mlp:MLPGenerator", MLPOptions),
}
DISCRIMINATORS = {
    "dcgan": BuiltIn("distgan.networks.dcgan:DCGANDiscriminator", DCGANDiscriminatorOptions),
    "resnet": BuiltIn("distgan.networks.resnet:ResNetDiscriminator", ResNetDiscriminatorOptions),
    "biggan": BuiltIn("distgan.networks.biggan:BigGANDiscriminator", BigGANDiscriminatorOptions),
    "progressive": BuiltIn("distgan.networks.progressive:ProgressiveDiscriminator", ProgressiveDiscriminatorOptions),
    "r3gan": BuiltIn("distgan.networks.r3gan:R3GANDiscriminator", R3GANOptions),
    "stylegan2": BuiltIn(
        "distgan.networks.stylegan2.discriminator:StyleGAN2Discriminator", StyleGAN2DiscriminatorOptions
    ),
    "gat": BuiltIn("distgan.networks.gat.discriminator:GATDiscriminator", GATDiscriminatorOptions),
    "patchgan": BuiltIn("distgan.networks.autoencoder.patchgan:PatchGANDiscriminator", PatchGANOptions),
    "characters": BuiltIn("distgan.networks.characters:CharacterDiscriminator", CharactersOptions),
    "mlp": BuiltIn("distgan.networks.mlp:MLPDiscriminator", MLPDiscriminatorOptions),
}
