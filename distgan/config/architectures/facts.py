"""What the rest of a run must know of a network, and options that several networks share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgan.config.fields import Batch, Section, Size

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

    kinds: ClassVar[tuple[str, ...]] = ("images", "text", "points", "latents")
    """Kinds of data that it is for."""
    power_of_two: ClassVar[bool] = False
    """Its images have a power of two of pixels per side."""
    has_stages: ClassVar[bool] = False
    """It is built of `networks.layers.stage.Stage`, whose precision `training.mixed_precision` can choose."""
    grows: ClassVar[bool] = False
    """It grows with the images seen; see `networks.progressive.GrowingNetwork`."""
    compares_batch: ClassVar[bool] = False
    """A sample's output depends on the other samples of the micro-batch of all ranks."""
    reconstructs: ClassVar[bool] = False
    """It maps real samples to reconstructions in place of latents to samples; see `networks.autoencoder.network`."""
    judges_patches: ClassVar[bool] = False
    """Its logits are of patches of a sample, (n, h, w) in place of (n,)."""
    levels: ClassVar[int] = 1
    """Outputs of a generator in training mode, side by side as channels, which its discriminator judges together."""

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
