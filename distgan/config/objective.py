"""What the players minimize."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from distgan.config.fields import Count, Fraction, NotNegative, Positive, Section


class ZeroCenteredPenaltyConfig(Section):
    """Penalty on the squared norm of the discriminator's gradient with respect to its input."""

    gamma: Positive
    """Weight of the penalty: gamma/2 times the mean squared norm of the logit's gradient."""
    final_gamma: Positive | None = None
    """Gamma at the last step. Gamma follows half a cosine to this value; null keeps it constant. R3GAN's code ends the
    schedule at a number of images and trains on."""
    every: Count = 1
    """Compute the penalty in every k-th discriminator update, multiplied by k (lazy regularization; Karras et al. 2020,
    appendix B). Learning rate and betas stay as configured; StyleGAN2's code rescales both."""


class GradientPenaltyConfig(Section):
    """Penalty on the distance of the discriminator's gradient norm from a target."""

    takes_effect_with: ClassVar = {"perturbation": ("points", ("gaussian",))}

    weight: Positive = 10.0
    """Weight of the penalty, lambda in the papers."""
    points: Literal["interpolated", "gaussian", "uniform"] = "interpolated"
    """Points at which the gradient is taken. `interpolated`: between a real and a generated sample (WGAN-GP).
    `gaussian`: real samples plus N(0, perturbation) (DRAGAN's paper). `uniform`: real samples plus noise scaled by the
    batch's spread (DRAGAN's code)."""
    target: NotNegative = 1.0
    """Gradient norm that the penalty aims at; 0 makes it the zero-centered penalty."""
    one_sided: bool = False
    """Penalize only norms above the target."""
    perturbation: Positive = 10.0
    """Variance of the `gaussian` noise. DRAGAN suggests 10; images are in [-1, 1], so smaller values stay nearer to
    them."""
    every: Count = 1
    """Compute the penalty in every k-th discriminator update, multiplied by k (lazy regularization; Karras et al. 2020,
    appendix B). Learning rate and betas stay as configured."""


class WeightClippingConfig(Section):
    """Weight clipping after each discriminator update (Arjovsky et al. 2017, algorithm 1)."""

    limit: Positive = 0.01
    """Largest absolute value of a weight. Weights are clamped to [-limit, limit]."""
    normalization: bool = True
    """Clamp the scales and offsets of normalization layers too, as the released code does."""


Target = Fraction | tuple[Fraction, Fraction]


class LabelSmoothingConfig(Section):
    """Soft and noisy labels for the discriminator's cross-entropy."""

    real: Target = 1.0
    """Target of real samples, or the range [low, high] that each sample's target is drawn from."""
    fake: Target = 0.0
    """Target of generated samples, or the range [low, high] that each sample's target is drawn from. Above 0, the
    optimal discriminator no longer vanishes away from the data."""
    flip: Fraction = 0.0
    """Probability that a sample gets the other side's target."""

    @model_validator(mode="after")
    def _check(self) -> LabelSmoothingConfig:
        for name in ("real", "fake"):
            value = getattr(self, name)
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{name}: {list(value)} is no range [low, high]")
        return self


class InstanceNoiseConfig(Section):
    """Gaussian noise on all inputs of the discriminator (Sønderby et al. 2017; Arjovsky and Bottou 2017)."""

    sigma: Positive = 0.1
    """Standard deviation of the noise at the start. Inputs are in [-1, 1]."""
    steps: Count | None = None
    """Number of steps over which sigma falls linearly to 0; null keeps it constant."""


class FeatureMatchingConfig(Section):
    """Salimans et al. 2016, section 3.1, as a term of the generator's loss.

    The reals are those of the step's last discriminator update, where the released code draws others.
    """

    weight: Positive = 1.0
    """Weight of the feature-matching term in the generator's loss."""
    layer: Annotated[str, Field(min_length=1)] | None = None
    """Name of the discriminator's layer whose outputs are compared. null: its last features before the logit."""
    distance: Literal["squared_l2", "l1"] = "squared_l2"
    """Distance between the batch means: `squared_l2` (the paper) or `l1`, the mean absolute difference (the released
    code)."""
    adversarial: bool = False
    """Keep the adversarial term in the generator's loss beside the feature-matching term."""


class HistoricalAveragingConfig(Section):
    """Distance of the weights from their average over time, in a player's loss (Salimans et al. 2016, section 3.3)."""

    generator: NotNegative = 0.0
    """Weight of the term in the generator's loss; 0 leaves it out."""
    discriminator: NotNegative = 0.0
    """Weight of the term in the discriminator's loss; 0 leaves it out."""


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
    """The loss of both players."""

    takes_effect_with: ClassVar = {"label_smoothing": ("adversarial", _LOG_ODDS)}

    adversarial: Family = "non_saturating"
    """Adversarial loss. `minimax` is the value function of Goodfellow et al. 2014; `non_saturating` is its -log D(G(z))
    variant. A relativistic generator compares with the reals of the step's last discriminator update; the released code
    draws new ones."""
    label_smoothing: LabelSmoothingConfig | None = None
    """Smoothed or noisy labels, for `minimax` and `non_saturating`; null uses the labels 1 and 0."""
    r1: ZeroCenteredPenaltyConfig | None = None
    """Gradient penalty on real samples (Mescheder et al. 2018, eq. 9); null leaves it out."""
    r2: ZeroCenteredPenaltyConfig | None = None
    """Gradient penalty on generated samples (Mescheder et al. 2018, section 4.1); null leaves it out."""
    gradient_penalty: GradientPenaltyConfig | None = None
    """Gradient penalty of WGAN-GP (Gulrajani et al. 2017), DRAGAN (Kodali et al. 2017) or GAN-GP (Fedus et al. 2018);
    null leaves it out."""
    drift: NotNegative = 0.0
    """Weight of E[D(x)^2] over real samples, which keeps a critic's output near 0 (Karras et al. 2018, appendix A.1); 0
    leaves it out."""
    weight_clipping: WeightClippingConfig | None = None
    """Clamping of the discriminator's weights after each of its updates; null leaves it out."""
    instance_noise: InstanceNoiseConfig | None = None
    """Noise on the discriminator's inputs; null leaves it out."""
    feature_matching: FeatureMatchingConfig | None = None
    """Feature matching in the generator's loss; null leaves it out."""
    historical_averaging: HistoricalAveragingConfig = HistoricalAveragingConfig()
    """Distance of the weights from their average over time, as a term of a player's loss."""

    @property
    def family(self) -> LossFamily:
        """Facts about the adversarial loss."""
        return LOSS_FAMILIES[self.adversarial]

    @property
    def generator_needs_reals(self) -> bool:
        """Whether the generator's loss looks at real samples."""
        return self.feature_matching is not None or self.family.needs_reals
