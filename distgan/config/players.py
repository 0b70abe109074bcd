"""The two networks and their optimizers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgan.config.architectures import DISCRIMINATORS, GENERATORS, NetworkOptions
from distgan.config.fields import (
    Batch,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Real,
    ScheduleConfig,
    ScheduledDecay,
    ScheduledNotNegative,
    ScheduledPositive,
    Section,
    Size,
)
from distgan.config.named import BuiltIn, NamedSection


class OptimizerOptions(Section):
    """Options of an optimizer."""

    quantities: ClassVar[tuple[str, ...] | None] = None
    """Names of its state tensors per parameter, of the parameter's shape except `step`. None: not known."""

    @property
    def rate_factor(self) -> float:
        """Factor of the learning rate in every step."""
        return 1.0


def lazy_factor(interval: int | None) -> float:
    """Return k / (k + 1) for the interval k of a lazy regularizer, and 1 for None (Karras et al. 2020, appendix B)."""
    return 1.0 if interval is None else interval / (interval + 1)


class AdamOptions(OptimizerOptions):
    """Adam (Kingma and Ba 2015)."""

    quantities = ("step", "exp_avg", "exp_avg_sq")

    betas: tuple[ScheduledDecay, ScheduledDecay] = (0.5, 0.999)
    """Decay rates of the first and second moments: two numbers or schedules."""
    eps: Positive = 1e-8
    """Constant added to the root of the second moment."""
    lazy_interval: Count | None = None
    """Interval k of lazy regularization that settings of StyleGAN2 are scaled for: the learning rate is multiplied by
    k/(k + 1), and the betas are raised to this power (Karras et al. 2020, appendix B). Its code takes a step of its own
    for the regularizer, k + 1 in place of k; here one step has both. null: the settings stay as they are."""

    @property
    def rate_factor(self) -> float:
        return lazy_factor(self.lazy_interval)


class RMSPropOptions(OptimizerOptions):
    """RMSProp (Hinton 2012)."""

    quantities = ("square_avg",)

    alpha: ScheduledDecay = 0.99
    """Decay rate of the squared gradients: a number or a schedule. PyTorch's default is 0.99; TensorFlow's is 0.9."""
    eps: Positive = 1e-8
    """Constant added to the root of the second moment."""


OPTIMIZERS = {
    "adam": BuiltIn("distgan.players.optimizers:adam", AdamOptions),
    "rmsprop": BuiltIn("distgan.players.optimizers:RMSProp", RMSPropOptions),
}


class OptimizerConfig(NamedSection):
    """One player's optimizer."""

    naming_key: ClassVar = "name"
    built_in: ClassVar = OPTIMIZERS
    given: ClassVar = ("parameters", "lr")
    facts_base: ClassVar = OptimizerOptions

    name: str = "adam"
    """Optimizer: `adam`, `rmsprop`, or an import path such as `torch.optim:AdamW`."""
    learning_rate: ScheduledPositive = 2e-4
    """Learning rate: a number or a schedule, such as `{start: 2e-4, end: 0}` for a linear decay over the run."""
    max_gradient_norm: Positive | None = None
    """Norm of the gradient over all parameters, averaged over ranks, above which it is scaled down to it. null: never.
    TensorBoard shows the norm before."""
    warmup_steps: CountOrZero = 0
    """Number of initial steps over which the learning rate rises linearly from near 0 to its value."""


class NetworkConfig(NamedSection):
    """A network and its optimizer."""

    naming_key: ClassVar = "architecture"
    facts_base: ClassVar = NetworkOptions

    architecture: str = "dcgan"
    """Network: `dcgan`, `resnet`, `biggan`, `progressive`, `r3gan`, `stylegan2` or `gat` for images, `characters` for
    text, `mlp` for points, or the import path of your own, such as `my_package.nets:MyNetwork`. A generator may be an
    `autoencoder` of images, and a discriminator a `patchgan`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer of this network."""

    @property
    def facts(self) -> NetworkOptions:
        """The options, or their base class if the code is not allowed."""
        found: NetworkOptions = super().facts
        return found


class GeneratorConfig(NetworkConfig):
    """The generator: its network and its optimizer. The other keys are options of its architecture."""

    built_in: ClassVar = GENERATORS
    given: ClassVar = ("shape", "latent_size")

    latent_size: Size = 100
    """Length of a latent vector."""
    latent_distribution: Literal["uniform", "normal"] = "uniform"
    """Distribution of the latents: `uniform` is U(-1, 1), `normal` is N(0, 1)."""

    @model_validator(mode="after")
    def _check_latents(self) -> GeneratorConfig:
        needed = self.facts.latent_distribution
        if needed not in (None, self.latent_distribution):
            raise ValueError(
                f"latent_distribution: found {self.latent_distribution}, but {self.architecture} with these options "
                f"needs {needed} latents; set latent_distribution: {needed}"
            )
        return self


class DiscriminatorConfig(NetworkConfig):
    """The discriminator (critic): its network and its optimizer. The other keys are options of its architecture."""

    built_in: ClassVar = DISCRIMINATORS
    given: ClassVar = ("shape",)


Width = Annotated[Real, Field(ge=0.01, le=0.25)]
"""Relative standard deviation of a power-function average."""


class EMAConfig(Section):
    """Exponential moving average of the generator's weights, which is evaluated and exported."""

    half_life_kimg: ScheduledNotNegative = ScheduleConfig(start=0, end=10, over=200)
    """Half-life of the average in thousands of images: a number or a schedule. Each step counts `critic_steps` batches.
    0 makes the average equal to the current weights. The default is StyleGAN's ramp, with a half-life of 5% of the
    images until it reaches 10,000."""
    profiles: Annotated[tuple[Width, ...], Field(max_length=8)] = ()
    """Relative widths of power-function averages to keep besides (Karras et al. 2024), such as `[0.05, 0.1]`: the
    standard deviation of an average's weights over time, as a fraction of the training so far. `distgan average` makes
    an average of any width of their snapshots. Each profile is one more copy of the weights on each rank."""
    snapshot_kimg: Annotated[Positive, Field(le=1e9)] = 8000.0
    """Thousands of images between snapshots of the profiles, which stay in `averages` of the run folder."""
    statistics_samples: Annotated[Count, Field(le=2**20)] = 2048
    """Number of latents from which batch-norm statistics are recomputed before evaluation, sampling and export."""

    @model_validator(mode="after")
    def _check(self) -> EMAConfig:
        if list(self.profiles) != sorted(set(self.profiles)):
            raise ValueError(f"profiles: {list(self.profiles)}: expected different widths in rising order")
        return self


class GrowthConfig(Section):
    """Progressive growing of both networks (Karras et al. 2018, section 2). Durations count real images shown to the
    discriminator. Levels, fades, batch sizes and rates follow them in every step; the released code adjusts these every
    4 minibatches (`minibatch_repeats`), each of which has images of its own."""

    first_resolution: Size = 4
    """Resolution of the first level in pixels, a power of two from 4 up."""
    stable_kimg: Annotated[NotNegative, Field(le=1e9)] = 600.0
    """Duration for which each level trains at full strength, in thousands of images."""
    fade_kimg: Annotated[NotNegative, Field(le=1e9)] = 600.0
    """Duration for which each level but the first is faded in linearly before that, in thousands of images."""
    batch_sizes: dict[Size, Batch] = Field(default_factory=dict)
    """Global batch sizes by resolution. Each applies to its resolution and the higher ones, in place of
    `training.batch_size`."""
    learning_rates: dict[Size, Positive] = Field(default_factory=dict)
    """Learning rates of both players by resolution, such as `{512: 1.5e-3, 1024: 2e-3}`. Each applies to its resolution
    and the higher ones, from the start of the fade on, in place of `optimizer.learning_rate`."""
    reset_optimizers: bool = True
    """Reset the optimizers' moments at the start and at the end of each fade, as the released code does."""

    @model_validator(mode="after")
    def _check(self) -> GrowthConfig:
        listed = {
            "first_resolution": [self.first_resolution],
            "batch_sizes": [*self.batch_sizes],
            "learning_rates": [*self.learning_rates],
        }
        for key, sides in listed.items():
            for side in sides:
                if side < 4 or side & (side - 1):
                    raise ValueError(f"{key}: {side} is not a power of two from 4 up")
        if self.stable_kimg + self.fade_kimg < 0.001:
            raise ValueError("stable_kimg: it and fade_kimg are 0, so that nothing would grow; leave growth out")
        return self
