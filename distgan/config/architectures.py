"""Options of the built-in networks, and what the rest of a run must know of a network."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgan.config.fields import Batch, Fraction, Section, Size
from distgan.config.named import BuiltIn

Depth = Annotated[Size, Field(le=1024)]
Normalization = Literal["synchronized", "batch", "layer", "virtual", "none"]


class MinibatchDiscriminationConfig(Section):
    """Minibatch discrimination before the discriminator's last layer (Salimans et al. 2016, section 3.2)."""

    kernels: Size = 100
    """Number of features that the layer adds, B in the paper."""
    dimensions: Size = 5
    """Number of values per kernel over which the L1 distance is taken, C in the paper."""
    over: Literal["global", "rank"] = "global"
    """Samples that each sample is compared with. `global`: the micro-batch of all ranks. `rank`: its own rank's part,
    which depends on the number of ranks."""


class MinibatchStddevConfig(Section):
    """Minibatch standard deviation as one more channel before the discriminator's last convolution (Karras et al. 2018,
    section 3)."""

    group_size: Batch = 4
    """Number of samples per group. It must divide the micro-batch; a smaller micro-batch is one group."""


class NetworkOptions(Section):
    """Options of a network. Class variables and properties are facts that the rest of a run depends on."""

    kinds: ClassVar[tuple[str, ...]] = ("images", "text", "points")
    """Kinds of data that it is for."""
    power_of_two: ClassVar[bool] = False
    """Its images have a power of two of pixels per side."""
    has_stages: ClassVar[bool] = False
    """It is built of `networks.layers.stage.Stage`, whose precision `training.mixed_precision` can choose."""
    grows: ClassVar[bool] = False
    """It grows with the images seen; see `networks.progressive.GrowingNetwork`."""
    compares_batch: ClassVar[bool] = False
    """A sample's output depends on the other samples of the micro-batch of all ranks."""

    @property
    def latent_distribution(self) -> str | None:
        """Distribution that its latents must have; None for any."""
        return None

    @property
    def batch_statistics(self) -> dict[str, str]:
        """Option -> samples that its statistics are over: `global` (the micro-batch of all ranks) or `rank`."""
        return {"architecture": "global"} if self.compares_batch else {}

    @property
    def normalizes_batch(self) -> bool:
        """Whether each output depends on the whole batch through batch norm."""
        return False

    @property
    def bounds_slope(self) -> bool:
        """Whether spectral norm bounds its Lipschitz constant, with no normalization that undoes it."""
        return False

    @property
    def has_reference(self) -> bool:
        """Whether it has virtual batch norm, and so an option `reference_size`."""
        return False

    @property
    def reference_samples(self) -> int | None:
        """Number of samples of virtual batch norm's reference batch; None without one, or before it is filled in."""
        return None


class BatchNormOptions(NetworkOptions):
    """Networks that may normalize by the moments of a batch."""

    normalization: Normalization = "synchronized"

    @property
    def batch_statistics(self) -> dict[str, str]:
        over = {"synchronized": "global", "batch": "rank"}.get(self.normalization)
        return {"normalization": over} if over else {}

    @property
    def normalizes_batch(self) -> bool:
        return self.normalization in ("synchronized", "batch")


class NormalizedOptions(BatchNormOptions):
    """Networks with a choice of normalization."""

    takes_effect_with: ClassVar = {"reference_size": ("normalization", ("virtual",))}

    normalization: Normalization = "synchronized"
    """Normalization: `synchronized` batch norm over all ranks, `batch` norm over each rank alone, `layer` norm,
    `virtual` batch norm, or `none`."""
    reference_size: Batch | None = None
    """Number of samples in virtual batch norm's reference batch. null: the micro-batch, at most 128."""
    spectral_norm: bool = False
    """Divide each weight matrix by its largest singular value (Miyato et al. 2018)."""

    @property
    def bounds_slope(self) -> bool:
        return self.spectral_norm and self.normalization == "none"

    @property
    def has_reference(self) -> bool:
        return self.normalization == "virtual"

    @property
    def reference_samples(self) -> int | None:
        return self.reference_size if self.has_reference else None


class ComparingOptions(NetworkOptions):
    """Discriminators that can compare samples by their last features."""

    minibatch_discrimination: MinibatchDiscriminationConfig | None = None
    """Minibatch discrimination; null leaves it out."""

    @property
    def batch_statistics(self) -> dict[str, str]:
        compared = self.minibatch_discrimination
        return super().batch_statistics | ({"minibatch_discrimination": compared.over} if compared else {})


class GroupingOptions(NetworkOptions):
    """Discriminators with the minibatch standard deviation."""

    minibatch_stddev: MinibatchStddevConfig | None = None
    """Minibatch standard deviation; null leaves it out."""

    @property
    def batch_statistics(self) -> dict[str, str]:
        return super().batch_statistics | ({"minibatch_stddev": "global"} if self.minibatch_stddev else {})


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

    kinds = ("images",)
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
    "characters": BuiltIn("distgan.networks.characters:CharacterDiscriminator", CharactersOptions),
    "mlp": BuiltIn("distgan.networks.mlp:MLPDiscriminator", MLPDiscriminatorOptions),
}
