"""Augmentation of the discriminator's inputs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from distgan.config.fields import (
    Count,
    Fraction,
    Positive,
    Real,
    ScheduleConfig,
    Section,
    ends_within,
    number,
    plain_or_section,
)
from distgan.config.named import BuiltIn, NamedSection


def _adaptive_or_number(value: Any) -> Any:
    if not isinstance(value, str) or value == "adaptive":
        return value
    try:
        return number(value)
    except ValueError:
        raise ValueError(f"expected adaptive or a number from 0 to 1, found {value[:80]!r}") from None


Probability = Annotated[Fraction | Literal["adaptive"], BeforeValidator(_adaptive_or_number)]
ScheduledProbability = Annotated[
    Probability | ScheduleConfig, plain_or_section(Probability, ScheduleConfig), ends_within(Fraction)
]


class AugmentationOptions(Section):
    """Options of an augmentation. Class variables are facts that the rest of a run depends on."""

    kinds: ClassVar[tuple[str, ...]] = ("images", "text", "points", "latents")
    """Kinds of data that it augments."""
    default_probability: ClassVar[Probability] = 1.0
    """Value of `probability` where a recipe leaves it out."""


class AdaOptions(AugmentationOptions):
    """Adaptive discriminator augmentation (Karras et al. 2020, "Training Generative Adversarial Networks with Limited
    Data", appendix B). The options multiply the probability of one transform each; names in the released code stand in
    parentheses. Defaults are its set `bgc`."""

    kinds = ("images",)
    default_probability = "adaptive"

    flip: Fraction = 1.0
    """Flip left-right, half of the time (`xflip`)."""
    quarter_turns: Fraction = 1.0
    """Turn by 0, 90, 180 or 270 degrees (`rotate90`)."""
    integer_translation: Fraction = 1.0
    """Shift by whole pixels, up to an eighth of the side (`xint`)."""
    scaling: Fraction = 1.0
    """Scale by 2^N(0, 0.2^2) (`scale`)."""
    rotation: Fraction = 1.0
    """Rotate by any angle, before or after `anisotropic_scaling` or both (`rotate`)."""
    anisotropic_scaling: Fraction = 1.0
    """Scale the width by 2^N(0, 0.2^2) and the height by its inverse, between two rotations (`aniso`)."""
    fractional_translation: Fraction = 1.0
    """Shift by N(0, 0.125^2) of the side (`xfrac`)."""
    brightness: Fraction = 1.0
    """Add N(0, 0.2^2)."""
    contrast: Fraction = 1.0
    """Multiply by 2^N(0, 0.5^2)."""
    luma_flip: Fraction = 1.0
    """Negate the mean of the channels, half of the time (`lumaflip`)."""
    hue: Fraction = 1.0
    """Rotate the colors about the gray axis by any angle."""
    saturation: Fraction = 1.0
    """Multiply the distance from the gray axis by 2^N(0, 1)."""
    frequency_filter: Fraction = 0.0
    """Amplify each of four frequency bands by 2^N(0, 1), at the same expected power (`imgfilter`)."""
    noise: Fraction = 0.0
    """Add Gaussian noise of standard deviation |N(0, 0.1^2)|."""
    cutout: Fraction = 0.0
    """Set a rectangle of half the width and height to 0."""


class DiffAugmentOptions(AugmentationOptions):
    """DiffAugment (Zhao et al. 2020)."""

    kinds = ("images",)

    policy: Annotated[tuple[Literal["color", "translation", "cutout"], ...], Field(min_length=1)] = (
        "color", "translation", "cutout",
    )  # fmt: skip
    """Transforms in the order in which they are applied."""

    @model_validator(mode="after")
    def _check(self) -> DiffAugmentOptions:
        _check_once(self.policy)
        return self


class LatentDiffAugmentOptions(AugmentationOptions):
    """DiffAugment of latents (Hyun et al. 2026, released code)."""

    kinds = ("latents",)

    policy: Annotated[tuple[Literal["color", "translation", "cutout", "flip"], ...], Field(min_length=1)] = (
        "color", "translation", "cutout", "flip",
    )  # fmt: skip
    """Transforms in the order in which they are applied. `color` changes half of the samples, and `flip` 40 % of
    them."""

    @model_validator(mode="after")
    def _check(self) -> LatentDiffAugmentOptions:
        _check_once(self.policy)
        return self


def _check_once(policy: tuple[str, ...]) -> None:
    twice = {name for name in policy if policy.count(name) > 1}
    if twice:
        raise ValueError(f"policy: {min(twice)} is there twice; name each transform once")


AUGMENTATIONS = {
    "ada": BuiltIn("distgan.losses.augmentation.ada:Ada", AdaOptions),
    "diffaugment": BuiltIn("distgan.losses.augmentation.diffaugment:DiffAugment", DiffAugmentOptions),
    "latent_diffaugment": BuiltIn(
        "distgan.losses.augmentation.latent_diffaugment:LatentDiffAugment", LatentDiffAugmentOptions
    ),
}


class ControllerConfig(Section):
    """Control of the probability by the discriminator's overfitting (Karras et al. 2020, "Training Generative
    Adversarial Networks with Limited Data", section 3)."""

    target: Annotated[Real, Field(gt=-1, lt=1)] = 0.6
    """Mean sign of the logits of augmented reals that it aims at. The probability rises while the mean is above."""
    every: Count = 4
    """Number of discriminator updates over which the mean is taken, and after which the probability changes."""
    kimg: Positive = 500.0
    """Thousands of images over which the probability can rise from 0 to 1."""


class AugmentationConfig(NamedSection):
    """Augmentation of all samples that the discriminator sees in training. A name alone stands for
    `{augmentation: NAME}`."""

    naming_key: ClassVar = "augmentation"
    built_in: ClassVar = AUGMENTATIONS
    facts_base: ClassVar = AugmentationOptions

    augmentation: str
    """Augmentation: `ada` or `diffaugment` of images, `latent_diffaugment` of latents, or the import path of your
    own."""
    probability: ScheduledProbability | None = None
    """Probability of each transform (`ada`) or of all at once (`diffaugment`, `latent_diffaugment`): a number, a
    schedule, or `adaptive`, which controls it by the discriminator's overfitting. null: `adaptive` for `ada`, 1 for the
    others."""
    controller: ControllerConfig = ControllerConfig()
    """Control of the `adaptive` probability."""
    penalties: Literal["clean", "augmented"] = "clean"
    """Points at which gradient penalties are taken. `clean`: samples before augmentation, with gradients through it, as
    StyleGAN2-ADA and R3GAN do. `augmented`: samples after it, as DiffAugment's StyleGAN2 does."""

    @property
    def facts(self) -> AugmentationOptions:
        """The options, or their base class if the code is not allowed."""
        found: AugmentationOptions = super().facts
        return found

    @property
    def chosen_probability(self) -> float | Literal["adaptive"] | ScheduleConfig:
        """`probability`, or the technique's default for null."""
        return self.facts.default_probability if self.probability is None else self.probability

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        if self.is_allowed and self.chosen_probability != "adaptive" and self.controller != ControllerConfig():
            given = "a schedule" if isinstance(self.chosen_probability, ScheduleConfig) else self.chosen_probability
            raise ValueError(
                f"controller: has no effect with probability: {given}, only with adaptive; leave it out, or change "
                "probability"
            )
        return self
