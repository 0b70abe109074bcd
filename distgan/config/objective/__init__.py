"""What the players minimize."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgan.config.fields import (
    Batch,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Real,
    ScheduledNotNegative,
    ScheduledPositive,
    Section,
)
from distgan.config.named import BuiltIn, NamedSection
from distgan.config.objective.alignment import AlignmentConfig
from distgan.config.objective.augmentation import AugmentationConfig
from distgan.config.objective.reconstruction import ReconstructionConfig
from distgan.config.objective.terms import TermConfig


class ZeroCenteredPenaltyConfig(Section):
    """Penalty on the squared norm of the discriminator's gradient with respect to its input."""

    takes_effect_with: ClassVar = dict.fromkeys(
        ("sigma", "antithetic", "draws", "fraction"), ("method", ("finite_difference",))
    )

    gamma: ScheduledPositive
    """Weight of the penalty: gamma/2 times the mean squared norm of the logit's gradient. A number or a schedule."""
    every: Count = 1
    """Compute the penalty in every k-th discriminator update, multiplied by k (lazy regularization; Karras et al. 2020,
    appendix B). Learning rate and betas stay as configured, unless Adam's `lazy_interval` scales both."""
    method: Literal["exact", "finite_difference"] = "exact"
    """`exact`: the gradient by automatic differentiation, whose backward pass needs second derivatives.
    `finite_difference`: an estimate from differences of logits along random directions, which needs first derivatives
    only. It is for smooth discriminators: with kinks, as of LeakyReLU, its gradient is not that of `exact`."""
    sigma: Annotated[Real, Field(ge=1e-5)] | None = None
    """Standard deviation of the step along each coordinate; smaller ones would measure rounding. null: 0.03 for images
    and text, 0.1 for points and latents."""
    antithetic: bool = True
    """Take the difference of D(x + s n) and D(x - s n), over 2 s. Otherwise that of D(x + s n) and D(x), over s, which
    is cheaper and has a larger error."""
    draws: Batch = 1
    """Number of random directions per sample."""
    fraction: Annotated[Real, Field(gt=0, le=1)] = 1.0
    """Share of the samples that are penalized: 1/k for a whole number k that divides the samples per process and
    micro-batch."""

    @property
    def stride(self) -> int:
        """The k of `fraction`: every k-th sample is penalized."""
        return round(1 / self.fraction)

    @model_validator(mode="after")
    def _check_fraction(self) -> ZeroCenteredPenaltyConfig:
        if abs(self.fraction * self.stride - 1) > 1e-3:
            raise ValueError(f"fraction: {self.fraction:g} is not 1/k for a whole number k, such as 0.5 or 0.25")
        return self

    def step(self, kind: str) -> float:
        """Return `sigma` for a kind of data, with its default filled in."""
        return self.sigma if self.sigma is not None else {"points": 0.1, "latents": 0.1}.get(kind, 0.03)


class GradientPenaltyConfig(Section):
    """Penalty on the distance of the discriminator's gradient norm from a target."""

    takes_effect_with: ClassVar = {"perturbation": ("points", ("gaussian",))}

    weight: ScheduledPositive = 10.0
    """Weight of the penalty, lambda in the papers."""
    points: Literal["interpolated", "gaussian", "uniform"] = "interpolated"
    """Points at which the gradient is taken. `interpolated`: between a real and a generated sample (WGAN-GP).
    `gaussian`: real samples plus N(0, perturbation) (DRAGAN's paper). `uniform`: real samples plus noise scaled by the
    batch's spread (DRAGAN's code)."""
    target: NotNegative = 1.0
    """Gradient norm that the penalty aims at. The penalty is weight times (norm/target - 1)^2, as in the code of
    progressive growing, which has 750 for CIFAR-10 (Karras et al. 2018). 0 makes it weight times norm^2, the
    zero-centered penalty."""
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

    sigma: ScheduledPositive = 0.1
    """Standard deviation of the noise: a number or a schedule, such as `{start: 0.1, end: 0}`. Inputs are in
    [-1, 1]."""


class FeatureMatchingConfig(Section):
    """Salimans et al. 2016, section 3.1, as a term of the generator's loss. `training.generator_reals` chooses the
    reals."""

    weight: ScheduledPositive = 1.0
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

    generator: ScheduledNotNegative = 0.0
    """Weight of the term in the generator's loss; 0 leaves it out."""
    discriminator: ScheduledNotNegative = 0.0
    """Weight of the term in the discriminator's loss; 0 leaves it out."""


class LossOptions(Section):
    """Options of an adversarial loss. Class variables are facts that the rest of a run depends on."""

    log_odds: ClassVar[bool] = False
    """The logits are log-odds of being real, trained by cross-entropy."""
    zero_is_boundary: ClassVar[bool] = False
    """A logit of 0 is undecided: reals are trained to be above it and fakes below."""
    estimates_wasserstein: ClassVar[bool] = False
    """The difference of the mean outputs estimates the Wasserstein distance."""
    needs_reals: ClassVar[bool] = False
    """The generator's loss looks at real samples."""
    compares_batch: ClassVar[bool] = False
    """The losses contain means over the micro-batch of all ranks, so that they depend on its size."""


class _CrossEntropyOptions(LossOptions):
    log_odds = True
    zero_is_boundary = True


class _HingeOptions(LossOptions):
    zero_is_boundary = True


class _WassersteinOptions(LossOptions):
    estimates_wasserstein = True


class _RelativisticOptions(LossOptions):
    needs_reals = True


class _RelativisticAverageOptions(LossOptions):
    needs_reals = True
    compares_batch = True


LOSSES = {
    "non_saturating": BuiltIn("distgan.losses.adversarial:NonSaturating", _CrossEntropyOptions),
    "minimax": BuiltIn("distgan.losses.adversarial:Minimax", _CrossEntropyOptions),
    "least_squares": BuiltIn("distgan.losses.adversarial:LeastSquares", LossOptions),
    "hinge": BuiltIn("distgan.losses.adversarial:Hinge", _HingeOptions),
    "wasserstein": BuiltIn("distgan.losses.adversarial:Wasserstein", _WassersteinOptions),
    "relativistic_paired": BuiltIn("distgan.losses.adversarial:RelativisticPaired", _RelativisticOptions),
    "relativistic_average": BuiltIn("distgan.losses.adversarial:RelativisticAverage", _RelativisticAverageOptions),
    "relativistic_average_least_squares": BuiltIn(
        "distgan.losses.adversarial:RelativisticAverageLeastSquares", _RelativisticAverageOptions
    ),
    "relativistic_average_hinge": BuiltIn(
        "distgan.losses.adversarial:RelativisticAverageHinge", _RelativisticAverageOptions
    ),
}


class AdversarialConfig(NamedSection):
    """The adversarial loss. A name alone stands for `{family: NAME}`."""

    naming_key: ClassVar = "family"
    built_in: ClassVar = LOSSES
    facts_base: ClassVar = LossOptions

    family: str = "non_saturating"
    """Loss: `non_saturating`, `minimax` (the value function of Goodfellow et al. 2014, of which `non_saturating` is the
    -log D(G(z)) variant), `least_squares`, `hinge`, `wasserstein`, `relativistic_paired`, `relativistic_average`,
    `relativistic_average_least_squares`, `relativistic_average_hinge`, or the import path of your own. A relativistic
    generator compares with the reals that `training.generator_reals` chooses."""

    @property
    def facts(self) -> LossOptions:
        """The options, or their base class if the code is not allowed."""
        found: LossOptions = super().facts
        return found


class ObjectiveConfig(Section):
    """The loss of both players."""

    adversarial: AdversarialConfig = AdversarialConfig()
    """Adversarial loss: its name, or a section with its options."""
    terms: list[TermConfig] = Field(default_factory=list)
    """Extra terms of the losses."""
    alignment: AlignmentConfig | None = None
    """Alignment of the discriminator's tokens with those of DINOv2; null leaves it out."""
    label_smoothing: LabelSmoothingConfig | None = None
    """Smoothed or noisy labels, for `minimax` and `non_saturating`; null uses the labels 1 and 0."""
    r1: ZeroCenteredPenaltyConfig | None = None
    """Gradient penalty on real samples (Mescheder et al. 2018, eq. 9); null leaves it out."""
    r2: ZeroCenteredPenaltyConfig | None = None
    """Gradient penalty on generated samples (Mescheder et al. 2018, section 4.1); null leaves it out."""
    gradient_penalty: GradientPenaltyConfig | None = None
    """Gradient penalty of WGAN-GP (Gulrajani et al. 2017), DRAGAN (Kodali et al. 2017) or GAN-GP (Fedus et al. 2018);
    null leaves it out."""
    drift: ScheduledNotNegative = 0.0
    """Weight of E[D(x)^2] over real samples, which keeps a critic's output near 0 (Karras et al. 2018, appendix A.1); 0
    leaves it out."""
    weight_clipping: WeightClippingConfig | None = None
    """Clamping of the discriminator's weights after each of its updates; null leaves it out."""
    instance_noise: InstanceNoiseConfig | None = None
    """Noise on the discriminator's inputs; null leaves it out."""
    augmentation: AugmentationConfig | None = None
    """Augmentation of the discriminator's inputs: its name, or a section with its options; null leaves it out."""
    feature_matching: FeatureMatchingConfig | None = None
    """Feature matching in the generator's loss; null leaves it out."""
    reconstruction: ReconstructionConfig | None = None
    """Loss of an autoencoder in the generator's place; null for other generators."""
    historical_averaging: HistoricalAveragingConfig = HistoricalAveragingConfig()
    """Distance of the weights from their average over time, as a term of a player's loss."""

    @property
    def generator_needs_reals(self) -> bool:
        """Whether the generator's update uses real samples: its loss looks at some, or it reconstructs them."""
        return self.reconstruction is not None or self.generator_compares_reals

    @property
    def generator_compares_reals(self) -> bool:
        """Whether the generator's loss looks at what the discriminator makes of real samples."""
        terms = (term.facts.needs_reals for term in self.terms if term.player == "generator")
        return self.feature_matching is not None or self.adversarial.facts.needs_reals or any(terms)

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.label_smoothing is not None and self.adversarial.is_allowed and not self.adversarial.facts.log_odds:
            names = [name for name, built_in in LOSSES.items() if built_in.options.log_odds]
            raise ValueError(
                f"label_smoothing: has no effect with adversarial: {self.adversarial.family}, only with "
                f"{' or '.join(names)}; leave it out, or change adversarial"
            )
        if self.augmentation is not None:
            self._check_augmentation(self.augmentation)
        return self

    def _check_augmentation(self, augmentation: AugmentationConfig) -> None:
        facts, allowed = self.adversarial.facts, self.adversarial.is_allowed and augmentation.is_allowed
        if allowed and augmentation.chosen_probability == "adaptive" and not facts.zero_is_boundary:
            raise ValueError(
                f"augmentation.probability: adaptive needs logits whose sign tells reals from fakes, which those of "
                f"adversarial: {self.adversarial.family} do not; set a number or a schedule, such as "
                "augmentation.probability=0.3"
            )
        if augmentation.penalties != "clean" and not (self.r1 or self.r2 or self.gradient_penalty):
            raise ValueError(
                f"augmentation.penalties: {augmentation.penalties} has no effect without r1, r2 or gradient_penalty; "
                "leave it out, or set one of them"
            )
