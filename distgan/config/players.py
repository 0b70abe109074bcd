"""The two networks and their optimizers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgan.config.fields import Batch, Count, CountOrZero, NotNegative, Positive, Real, Section, Size


class OptimizerConfig(Section):
    """One player's optimizer and learning-rate schedule."""

    takes_effect_with: ClassVar = {"betas": ("name", ("adam",)), "alpha": ("name", ("rmsprop",))}

    name: Literal["adam", "rmsprop"] = "adam"
    """Optimizer."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    betas: tuple[Real, Real] = (0.5, 0.999)
    """Decay rates of Adam's first and second moments."""
    alpha: Annotated[Real, Field(ge=0, lt=1)] = 0.99
    """Decay rate of RMSProp's squared gradients. PyTorch's default is 0.99; TensorFlow's is 0.9."""
    eps: Positive = 1e-8
    """Constant added to the root of the second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule. `linear` and `cosine` fall to 0 at the last step."""
    warmup_steps: CountOrZero = 0
    """Number of steps over which the learning rate rises linearly to its peak."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: {beta} is not in [0, 1)")
        return self


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


Normalization = Literal["synchronized", "batch", "layer", "virtual", "none"]


class NetworkConfig(Section):
    """Options of both networks."""

    takes_effect_with: ClassVar = {
        "max_width": ("architecture", ("dcgan", "resnet", "progressive", "r3gan")),
        "depth": ("architecture", ("characters", "mlp", "r3gan")),
        "reference_size": ("normalization", ("virtual",)),
    }

    architecture: Literal["dcgan", "resnet", "progressive", "r3gan", "characters", "mlp"] = "dcgan"
    """Network: `dcgan`, `resnet`, `progressive` or `r3gan` for images, `characters` for text, `mlp` for points."""
    width: Size = 64
    """Channels of the layer next to the images; they double toward the latents (or the logit) up to `max_width`.
    `characters` and `mlp` have this width throughout, and so has `resnet` at 32 pixels (128 in WGAN-GP, 256 and 128 in
    SNGAN). Larger `resnet`s multiply it by SNGAN's table, with 64 there."""
    max_width: Size = 1024
    """Largest number of channels of a layer."""
    depth: Annotated[Size, Field(le=1024)] | None = None
    """Number of residual blocks of `characters` (null: 5), of residual blocks per stage of `r3gan` (null: 2), or of
    hidden layers of `mlp` (null: 3). The depth of other networks follows from `data.resolution`."""
    normalization: Normalization = "synchronized"
    """Normalization: `synchronized` batch norm over all ranks, `batch` norm over each rank alone, `layer` norm,
    `virtual` batch norm, or `none`."""
    reference_size: Batch | None = None
    """Number of samples in virtual batch norm's reference batch. null: the micro-batch, at most 128."""
    spectral_norm: bool = False
    """Divide each weight matrix by its largest singular value (Miyato et al. 2018)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning-rate schedule of this network."""


class GeneratorConfig(NetworkConfig):
    """The generator: its network and its optimizer."""

    latent_size: Size = 100
    """Length of a latent vector."""
    latent_distribution: Literal["uniform", "normal"] = "uniform"
    """Distribution of the latents: `uniform` is U(-1, 1), `normal` is N(0, 1)."""


class DiscriminatorConfig(NetworkConfig):
    """The discriminator (critic): its network and its optimizer."""

    takes_effect_with: ClassVar = NetworkConfig.takes_effect_with | {
        "pooling": ("architecture", ("resnet",)),
        "minibatch_discrimination": ("architecture", ("dcgan", "mlp")),
        "minibatch_stddev": ("architecture", ("dcgan", "progressive")),
    }

    pooling: Literal["sum", "mean"] = "sum"
    """Pooling of `resnet` before its logit: `sum` (SNGAN) or `mean` (WGAN-GP)."""
    minibatch_discrimination: MinibatchDiscriminationConfig | None = None
    """Minibatch discrimination, for `dcgan` and `mlp`; null leaves it out."""
    minibatch_stddev: MinibatchStddevConfig | None = None
    """Minibatch standard deviation, for `dcgan` and `progressive`; null leaves it out."""


class EMAConfig(Section):
    """Exponential moving average of the generator's weights, which is evaluated and exported."""

    half_life_kimg: Annotated[Real, Field(ge=0, le=1e12)] = 10.0
    """Half-life of the average in thousands of images. Each step counts `critic_steps` batches. 0 makes the average
    equal to the current weights."""
    rampup: Positive | None = 0.05
    """Largest half-life early in training, as a fraction of the images seen so far; null switches the ramp-up off."""
    statistics_samples: Annotated[Count, Field(le=2**20)] = 2048
    """Number of latents from which batch-norm statistics are recomputed before evaluation, sampling and export."""


class GrowthConfig(Section):
    """Progressive growing of both networks (Karras et al. 2018, section 2). Durations count real images shown to the
    discriminator."""

    first_resolution: Size = 4
    """Resolution of the first level in pixels, a power of two from 4 up."""
    stable_kimg: Annotated[NotNegative, Field(le=1e9)] = 600.0
    """Duration for which each level trains at full strength, in thousands of images."""
    fade_kimg: Annotated[NotNegative, Field(le=1e9)] = 600.0
    """Duration for which each level but the first is faded in linearly before that, in thousands of images."""
    batch_sizes: dict[Size, Batch] = Field(default_factory=dict)
    """Global batch sizes by resolution. Each applies to its resolution and the higher ones, in place of
    `training.batch_size`."""
    reset_optimizers: bool = True
    """Reset the optimizers' moments at the start and at the end of each fade, as the released code does."""

    @model_validator(mode="after")
    def _check(self) -> GrowthConfig:
        for key, sides in (("first_resolution", [self.first_resolution]), ("batch_sizes", self.batch_sizes)):
            for side in sides:
                if side < 4 or side & (side - 1):
                    raise ValueError(f"{key}: {side} is not a power of two from 4 up")
        if self.stable_kimg + self.fade_kimg < 0.001:
            raise ValueError("stable_kimg: it and fade_kimg are 0, so that nothing would grow; leave growth out")
        return self
