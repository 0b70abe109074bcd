"""Extra terms of the players' losses."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgan.config.fields import Batch, Count, Real, ScheduledReal, Section
from distgan.config.named import BuiltIn, NamedSection


class TermOptions(Section):
    """Options of an extra term of a player's loss. Class variables are facts that the rest of a run depends on."""

    needs_reals: ClassVar[bool] = False
    """A term of the generator looks at real samples; a term of the discriminator always may."""
    needs_features: ClassVar[bool] = False
    """It looks at the discriminator's last features before the logit."""
    compares_batch: ClassVar[bool] = False
    """It compares samples of the micro-batch of all ranks, so that it depends on its size."""


class PathLengthOptions(TermOptions):
    """Path-length regularization of a style-based generator (Karras et al. 2020, section 3.2)."""

    compares_batch = True

    decay: Annotated[Real, Field(gt=0, le=1)] = 0.01
    """Weight of an update's mean path length in its mean over training."""
    shrink: Batch = 2
    """Use every `shrink`-th sample. It divides the samples per process and micro-batch."""


TERMS = {
    "orthogonal_regularization": BuiltIn("distgan.losses.orthogonality:OrthogonalRegularization", TermOptions),
    "path_length": BuiltIn("distgan.losses.path_length:PathLength", PathLengthOptions),
}


class TermConfig(NamedSection):
    """An extra term of a player's loss. The other keys are its options."""

    naming_key: ClassVar = "term"
    built_in: ClassVar = TERMS
    facts_base: ClassVar = TermOptions

    term: str
    """Term: `orthogonal_regularization` of the weights (Brock et al. 2019, at a weight of 1e-4), `path_length`
    regularization of a `stylegan2` generator (Karras et al. 2020, at a weight of 2 in every 4th update), or the import
    path of a class of your own, such as `my_package.losses:ModeSeeking`."""
    weight: ScheduledReal = 1.0
    """Weight of the term in the loss, which may be negative."""
    every: Count = 1
    """Compute the term in every k-th update of its player, multiplied by k (lazy regularization; Karras et al. 2020,
    appendix B)."""
    player: Literal["generator", "discriminator"] = "generator"
    """Player whose loss it is added to."""

    @property
    def facts(self) -> TermOptions:
        """The options, or their base class if the code is not allowed."""
        found: TermOptions = super().facts
        return found
