"""Alignment of the discriminator with DINOv2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distgan.config.fields import ScheduledPositive, Section

if TYPE_CHECKING:
    from distgan.config.players import DiscriminatorConfig

FEATURES = 768
"""Features of a token of DINOv2 ViT-B/14."""
IMAGE_SIDE = 224
"""Side of the images that it is given, in pixels."""
_OPTION = "alignment_size"


class AlignmentConfig(Section):
    """Term of the discriminator's loss that makes its tokens of real samples predict the tokens of DINOv2 ViT-B/14 for
    their images (Hyun et al. 2026). It is for discriminators with the option `alignment_size`, such as `gat`."""

    weights: str | None = None
    """Path of DINOv2's weights: `model.safetensors` of `facebook/dinov2-base`, or its folder. null: the term is left
    out, with a warning."""
    weight: ScheduledPositive = 1.0
    """Weight of the term in the discriminator's loss."""


def with_projector(network: DiscriminatorConfig, alignment: AlignmentConfig | None, kind: str) -> DiscriminatorConfig:
    """Return the discriminator with a projector if there is an alignment.

    Raises:
        ValueError: it has none, or one without an alignment, or this kind of data has no images.
    """
    options = network.facts
    if type(options) is network.facts_base:  # code that is not allowed, or not there
        return network
    size = getattr(options, _OPTION, None)
    if alignment is None or alignment.weights is None:
        if size is not None:
            raise ValueError(
                f"discriminator.{_OPTION}: {size} has no effect without objective.alignment.weights; leave it out"
            )
        return network
    if kind not in ("images", "latents"):
        raise ValueError(f"objective.alignment: {kind} (data.kind) have no images; set objective.alignment=null")
    if _OPTION not in type(options).model_fields:
        raise ValueError(
            f"objective.alignment: discriminator.architecture: {network.architecture} has no option {_OPTION}; choose "
            "gat, or set objective.alignment=null"
        )
    if size is None:
        return type(network).model_validate({**network.model_dump(), _OPTION: FEATURES})
    if size != FEATURES:
        raise ValueError(f"discriminator.{_OPTION}: {size}: tokens of DINOv2 ViT-B/14 have {FEATURES} features")
    return network


def alignment_warning(alignment: AlignmentConfig | None) -> str | None:
    """Return the line that says that the term is left out, if it is."""
    if alignment is None or alignment.weights is not None:
        return None
    return (
        "objective.alignment.weights = null: the discriminator is not aligned with DINOv2, so that results do not "
        "compare with published ones; set it to the path of the file that `hf download facebook/dinov2-base "
        "model.safetensors` prints"
    )
