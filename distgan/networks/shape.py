"""Kind and sizes of the samples that a network takes or makes."""

from __future__ import annotations

from dataclasses import dataclass

from distgan.config import DataConfig


@dataclass(frozen=True)
class SampleShape:
    """Kind and sizes of samples; sizes that the kind does not have are 0."""

    kind: str = "images"
    """`images` (n, channels, resolution, resolution) in [-1, 1], `text` (n, vocabulary, length), each position a
    distribution over characters, `points` (n, dimensions), or `latents` (n, channels, resolution, resolution) of an
    autoencoder, shifted and scaled."""
    resolution: int = 0
    channels: int = 0
    length: int = 0
    vocabulary: int = 0
    dimensions: int = 0
    num_classes: int = 0
    """0 for an unconditional run."""
    dequantized: bool = False
    """Level x of a pixel is all of [x/128 - 1, (x + 1)/128 - 1) (`data.dequantize`), and not the point x/127.5 - 1."""

    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    """Of latents, per channel: networks see (latent - shift) scale."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of one sample, float, as network input or output."""
        return {
            "images": (self.channels, self.resolution, self.resolution),
            "latents": (self.channels, self.resolution, self.resolution),
            "text": (self.vocabulary, self.length),
            "points": (self.dimensions,),
        }[self.kind]


def sample_shape(
    data: DataConfig,
    *,
    num_classes: int = 0,
    vocabulary: int = 0,
    shift: tuple[float, ...] = (),
    scale: tuple[float, ...] = (),
) -> SampleShape:
    """Return the sample shape of a data section.

    Args:
        num_classes: number of classes in the shards; ignored without `data.labels`.
        vocabulary: number of characters in the shards.
        shift, scale: of the latents in the shards, per channel.
    """
    classes = num_classes if data.labels else 0
    if data.kind == "text":
        return SampleShape("text", length=data.length, vocabulary=vocabulary, num_classes=classes)
    if data.kind == "points":
        return SampleShape("points", dimensions=data.dimensions, num_classes=classes)
    if data.kind == "latents":
        return SampleShape("latents", data.resolution, data.channels, num_classes=classes, shift=shift, scale=scale)
    return SampleShape(
        "images",
        resolution=data.resolution,
        channels=data.channels,
        num_classes=classes,
        dequantized=data.dequantize,
    )
