"""What the players minimize."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from distgan.config.fields import Count, Fraction, NotNegative, Positive, Section


class ZeroCenteredPenaltyConfig(Section):
    """A penalty on the squared norm of the discriminator's gradient at its inputs."""

    gamma: Positive
    """The penalty is gamma/2 times the mean squared norm of the gradient of the logit."""
    final_gamma: Positive | None = None
    """Gamma goes along half a cosine to this value at the last step; null keeps it. R3GAN's code ends at a number of
    images of its own, and trains on."""
    every: Count = 1
    """Computed on each k-th discriminator update only, and then multiplied by k (lazy regularization; Karras et al.
    2020, appendix B). Learning rate and betas stay as configured; StyleGAN2's code, whose penalty has an optimizer step
    of its own, rescales both, by k/(k + 1) and to that power."""


class GradientPenaltyConfig(Section):
    """A penalty on how far the norm of the discriminator's gradient is from a target."""

    takes_effect_with: ClassVar = {"perturbation": ("points", ("gaussian",))}

    weight: Positive = 10.0
    """Lambda."""
    points: Literal["interpolated", "gaussian", "uniform"] = "interpolated"
    """Where the gradient is taken: between a real and a fake sample (WGAN-GP); around real ones, with noise from
    N(0, perturbation) (DRAGAN's paper) or from the batch's spread as in DRAGAN's released code."""
    target: NotNegative = 1.0
    """The norm aimed at; 0 is the zero-centered penalty."""
    one_sided: bool = False
    """Penalize only norms above the target."""
    perturbation: Positive = 10.0
    """Variance of `gaussian` noise. 10 is DRAGAN's suggestion; images here are in [-1, 1], and less stays near them."""
    every: Count = 1
    """Computed on each k-th discriminator update only, and then multiplied by k (lazy regularization; Karras et al.
    2020, appendix B). Learning rate and betas stay as configured; StyleGAN2's code, whose penalty has an optimizer step
    of its own, rescales both, by k/(k + 1) and to that power."""


class WeightClippingConfig(Section):
    """Weight clipping of Arjovsky et al. 2017, algorithm 1, after each discriminator update."""

    limit: Positive = 0.01
    """Parameters are clamped to [-limit, limit]."""
    normalization: bool = True
    """Clamp the scales and offsets of normalization layers too, as the released code does."""


Target = Fraction | tuple[Fraction, Fraction]


class LabelSmoothingConfig(Section):
    """Soft and noisy labels for the discriminator's cross-entropy."""

    real: Target = 1.0
    """The target for real samples, or the range [low, high] that each sample's is drawn from. Above 1 the loss would
    have no minimum."""
    fake: Target = 0.0
    """The same for generated samples. Above 0 the optimal discriminator no longer vanishes off the data."""
    flip: Fraction = 0.0
    """Probability that a sample's target is that of the other side."""

    @model_validator(mode="after")
    def _check(self) -> LabelSmoothingConfig:
        for name in ("real", "fake"):
            value = getattr(self, name)
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{name}: {list(value)} is no range [low, high]")
        return self


class InstanceNoiseConfig(Section):
    """Gaussian noise on all of the discriminator's inputs (Sonderby et al. 2017; Arjovsky and Bottou 2017)."""

    sigma: Positive = 0.1
    """Its standard deviation at the start; inputs are in [-1, 1]."""
    steps: Count | None = None
    """It falls linearly to 0 over so many steps; null keeps it."""


class FeatureMatchingConfig(Section):
    """Salimans et al. 2016, section 3.1, as a term of the generator's loss.

    The reals are those of the step's last discriminator update, where the released code draws others.
    """

    weight: Positive = 1.0
    """Its factor."""
    layer: Annotated[str, Field(min_length=1)] | None = None
    """Name of a layer inside the discriminator; null: its last features before the logit."""
    distance: Literal["squared_l2", "l1"] = "squared_l2"
    """Of the batch means: `squared_l2` is the paper's, `l1` (mean absolute difference) the released code's."""
    adversarial: bool = False
    """Keep the generator's adversarial term beside it."""


class HistoricalAveragingConfig(Section):
    """Salimans et al. 2016, section 3.3: |theta - mean over time of theta|^2 in a player's loss, times a weight."""

    generator: NotNegative = 0.0
    """The generator's weight of it; 0 leaves it out."""
    discriminator: NotNegative = 0.0
    """The discriminator's weight of it; 0 leaves it out."""


Family = Literal[
    "non_saturating", "minimax", "least_squares", "hinge", "wasserstein", "relativistic_paired",
    "relativistic_average", "relativistic_average_least_squares", "relativistic_average_hinge",
]  # fmt: skip


class LossFamily(NamedTuple):
    """Facts about an adversarial loss that the rest of a run depends on."""

    log_odds: bool = False
    """The logits are log-odds of being real, trained by cross-entropy."""
    estimates_wasserstein: bool = False
    """The difference of the mean outputs estimates the Wasserstein distance."""
    needs_reals: bool = False
    """The generator's loss looks at real samples."""
    compares_batch: bool = False
    """The loss contains means over the batch, so that it depends on how a batch is cut into micro-batches."""


LOSS_FAMILIES: dict[Family, LossFamily] = {
    "non_saturating": LossFamily(log_odds=True),
    "minimax": LossFamily(log_odds=True),
    "least_squares": LossFamily(),
    "hinge": LossFamily(),
    "wasserstein": LossFamily(estimates_wasserstein=True),
    "relativistic_paired": LossFamily(needs_reals=True),
    "relativistic_average": LossFamily(needs_reals=True, compares_batch=True),
    "relativistic_average_least_squares": LossFamily(needs_reals=True, compares_batch=True),
    "relativistic_average_hinge": LossFamily(needs_reals=True, compares_batch=True),
}
_LOG_ODDS = tuple(name for name, family in LOSS_FAMILIES.items() if family.log_odds)


class ObjectiveConfig(Section):
    """What the players minimize."""

    takes_effect_with: ClassVar = {"label_smoothing": ("adversarial", _LOG_ODDS)}

    adversarial: Family = "non_saturating"
    """The family of losses; `minimax` is Goodfellow's value function itself, `non_saturating` the -log D(G(z)) one. The
    generator of a relativistic one is compared with the reals of the step's last discriminator update, where the
    released code draws others."""
    label_smoothing: LabelSmoothingConfig | None = None
    """Smoothed or noisy labels, for `minimax` and `non_saturating`."""
    r1: ZeroCenteredPenaltyConfig | None = None
    """Gradient penalty on real samples (Mescheder et al. 2018, eq. 9)."""
    r2: ZeroCenteredPenaltyConfig | None = None
    """Gradient penalty on generated samples (Mescheder et al. 2018, section 4.1)."""
    gradient_penalty: GradientPenaltyConfig | None = None
    """WGAN-GP (Gulrajani et al. 2017), DRAGAN (Kodali et al. 2017), and GAN-GP (Fedus et al. 2018)."""
    drift: NotNegative = 0.0
    """Factor of E[D(x)^2] over real samples, holding a critic near 0 (Karras et al. 2018, appendix A.1)."""
    weight_clipping: WeightClippingConfig | None = None
    """Clamp the discriminator's parameters after each of its updates."""
    instance_noise: InstanceNoiseConfig | None = None
    """Noise on the discriminator's inputs."""
    feature_matching: FeatureMatchingConfig | None = None
    """Match the batch means of the discriminator's features."""
    historical_averaging: HistoricalAveragingConfig = HistoricalAveragingConfig()
    """Hold a player near the average of its past parameters."""

    @property
    def family(self) -> LossFamily:
        """Facts about the adversarial loss."""
        return LOSS_FAMILIES[self.adversarial]

    @property
    def generator_needs_reals(self) -> bool:
        """Whether the generator's loss looks at real samples."""
        return self.feature_matching is not None or self.family.needs_reals
