"""The two networks and their optimizers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgan.config.fields import Batch, Count, CountOrZero, NotNegative, Positive, Real, Section, Size


class OptimizerConfig(Section):
    """One player's optimizer and learning-rate schedule."""

    takes_effect_with: ClassVar = {"betas": ("name", ("adam",)), "alpha": ("name", ("rmsprop",))}

    name: Literal["adam", "rmsprop"] = "adam"
    """The optimization algorithm."""
    learning_rate: Positive = 2e-4
    """The peak learning rate."""
    betas: tuple[Real, Real] = (0.5, 0.999)
    """Adam's decay rates of the two moments."""
    alpha: Annotated[Real, Field(ge=0, lt=1)] = 0.99
    """RMSProp's decay rate of the squared gradients (torch's default; TensorFlow's is 0.9)."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """`linear` and `cosine` fall to 0 at the last step."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises linearly to its peak."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: {beta} is not in [0, 1)")
        return self


class MinibatchDiscriminationConfig(Section):
    """Salimans et al. 2016, section 3.2, before the discriminator's last layer."""

    kernels: Size = 100
    """B, the features it adds."""
    dimensions: Size = 5
    """C, over which the L1 distance of a kernel is taken."""
    over: Literal["global", "rank"] = "global"
    """Whom a sample is compared with: the micro-batch of all ranks, or its own rank's share, which depends on W."""


class MinibatchStddevConfig(Section):
    """Karras et al. 2018, section 3: one more channel before the discriminator's last convolution."""

    group_size: Batch = 4
    """Samples in a group (the micro-batch where that is smaller); it must divide the micro-batch."""


Normalization = Literal["synchronized", "batch", "layer", "virtual", "none"]


class NetworkConfig(Section):
    """What both networks have."""

    takes_effect_with: ClassVar = {
        "max_width": ("architecture", ("dcgan", "resnet", "progressive", "r3gan")),
        "depth": ("architecture", ("characters", "mlp", "r3gan")),
        "reference_size": ("normalization", ("virtual",)),
    }

    architecture: Literal["dcgan", "resnet", "progressive", "r3gan", "characters", "mlp"] = "dcgan"
    """Which network: `dcgan`, `resnet`, `progressive`, `r3gan` for images, `characters` for text, `mlp` for points."""
    width: Size = 64
    """Channels of the layer next to the images; they double towards the latents (or the logit), up to `max_width`.
    The `characters` and `mlp` networks are this wide throughout, and so is `resnet` at 32 pixels (WGAN-GP: 128; SNGAN:
    256 for its generator, 128 for its discriminator); above, it multiplies this by SNGAN's table, 64 there."""
    max_width: Size = 1024
    """Upper bound of the channels of a layer."""
    depth: Annotated[Size, Field(le=1024)] | None = None
    """Residual blocks of `characters` (default 5) and of a stage of `r3gan` (2), hidden layers of `mlp` (3). That of
    the others follows from `data.resolution`."""
    normalization: Normalization = "synchronized"
    """Batch norm over all ranks, over each rank alone, layer norm, virtual batch norm, or none."""
    reference_size: Batch | None = None
    """Samples in virtual batch norm's reference batch; null: as many as the micro-batch, at most 128."""
    spectral_norm: bool = False
    """Divide each weight by its largest singular value (Miyato et al. 2018)."""
    optimizer: OptimizerConfig = OptimizerConfig()


class GeneratorConfig(NetworkConfig):
    """The generator: its network and its optimizer."""

    latent_size: Size = 100
    """Numbers in a latent vector."""
    latent_distribution: Literal["uniform", "normal"] = "uniform"
    """`uniform` is U(-1, 1), `normal` is N(0, 1)."""


class DiscriminatorConfig(NetworkConfig):
    """The discriminator (critic): its network and its optimizer."""

    takes_effect_with: ClassVar = NetworkConfig.takes_effect_with | {
        "pooling": ("architecture", ("resnet",)),
        "minibatch_discrimination": ("architecture", ("dcgan", "mlp")),
        "minibatch_stddev": ("architecture", ("dcgan", "progressive")),
    }

    pooling: Literal["sum", "mean"] = "sum"
    """How `resnet` pools before its logit: `sum` (SNGAN) or `mean` (WGAN-GP)."""
    minibatch_discrimination: MinibatchDiscriminationConfig | None = None
    """Let it compare the samples of a batch (`dcgan` and `mlp`)."""
    minibatch_stddev: MinibatchStddevConfig | None = None
    """Let it see how much the samples of a batch differ (`dcgan` and `progressive`)."""


class EMAConfig(Section):
    """The exponential moving average of the generator's weights, which is what is evaluated and exported."""

    half_life_kimg: Annotated[Real, Field(ge=0, le=1e12)] = 10.0
    """Half-life in thousands of images, of which each step counts `critic_steps` batches; 0 makes the average equal the
    live weights."""
    rampup: Positive | None = 0.05
    """Early on the half-life is at most this share of the images seen so far; null switches the ramp off."""
    statistics_samples: Annotated[Count, Field(le=2**20)] = 2048
    """Addressed latents from which batch-norm statistics are recomputed before evaluation, sampling and export."""


class GrowthConfig(Section):
    """Progressive growing (Karras et al. 2018, section 2), in thousands of real images shown to the discriminator."""

    first_resolution: Size = 4
    """The resolution of the first level, a power of two."""
    stable_kimg: Annotated[NotNegative, Field(le=1e9)] = 600.0
    """Each level trains as it is for so long."""
    fade_kimg: Annotated[NotNegative, Field(le=1e9)] = 600.0
    """Before that, each level but the first is faded in linearly for so long."""
    batch_sizes: dict[Size, Batch] = Field(default_factory=dict)
    """Global batch sizes by resolution, for levels where it is not `training.batch_size`; they apply to that
    resolution and the higher ones."""
    reset_optimizers: bool = True
    """Forget the optimizers' moments at the start and at the end of each fade, as the released code does."""

    @model_validator(mode="after")
    def _check(self) -> GrowthConfig:
        for key, sides in (("first_resolution", [self.first_resolution]), ("batch_sizes", self.batch_sizes)):
            for side in sides:
                if side < 4 or side & (side - 1):
                    raise ValueError(f"{key}: {side} is not a power of two from 4 up")
        if self.stable_kimg + self.fade_kimg < 0.001:
            raise ValueError("stable_kimg: it and fade_kimg are 0, so that nothing would grow; leave growth out")
        return self
