"""What is trained on, and how it is read."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from distgan.config.fields import Color, Count, CountOrZero, Fraction, Real, Section, Size, number


class DataConfig(Section):
    """What is trained on, and how it is read."""

    takes_effect_with: ClassVar = {
        **dict.fromkeys(
            ("resolution", "channels", "background", "dequantize", "mirror", "max_pixels"), ("kind", ("images",))
        ),
        "length": ("kind", ("text",)),
        "dimensions": ("kind", ("points",)),
        **dict.fromkeys(("lanes", "shuffle_block"), ("order", ("lanes",))),
    }

    kind: Literal["images", "text", "points"] = "images"
    """What a sample is: an image, a line of text, or a point of a few numbers."""

    path: str | list[str]
    """A folder of shards, a glob, a brace expansion, a URL that fsspec understands, or a list of these."""
    resolution: Annotated[CountOrZero, Field(le=2**16)] = 0
    """Images are center-cropped to a square and resized to this many pixels a side, a power of two.
    Every run on images needs it."""
    channels: Annotated[Literal[1, 3], BeforeValidator(number)] = 3
    """1 for grayscale, 3 for RGB; images are converted when they differ."""
    background: Color = "white"
    """Color that transparent images are composited on: `white`, `black`, `gray`, or `#rrggbb`."""
    labels: bool = False
    """Use the class labels: both networks become class-conditional."""
    length: Annotated[Size, Field(ge=4)] = 32
    """Characters of a line of text: longer lines are cut, shorter ones padded."""
    dimensions: Size = 2
    """Numbers of a point."""
    dequantize: bool = False
    """Map 8-bit pixels to 2x/256 - 1 plus addressed noise from U[0, 1/128), as the WGAN-GP and SNGAN code does."""
    mirror: bool = False
    """Flip each image left-right with probability 1/2, as a function of seed and stream position."""
    order: Literal["permutation", "lanes"] = "permutation"
    """`permutation`: uniform over all samples, for local data; `lanes`: few shards at a time, for object stores."""
    lanes: Annotated[Count, Field(le=2**20)] = 16
    """Lanes of the `lanes` order: about the largest number of nodes the run will ever use."""
    shuffle_block: Count = 4096
    """Samples of a lane that are shuffled together in the `lanes` order."""
    num_workers: Annotated[CountOrZero, Field(le=1024)] = 2
    """Loader processes per rank; 0 reads in the training process. The data does not depend on it."""
    prefetch: Annotated[Count, Field(le=1024)] = 2
    """Batches each loader process keeps ready."""
    cache_dir: str | None = None
    """Node-local folder for remote shards. Default: `$DISTGAN_CACHE` or `~/.cache/distgan`."""
    cache_gigabytes: Annotated[Real, Field(gt=0, le=1e9)] = 50.0
    """Upper bound of that folder, in 1e9 bytes."""
    retries: Annotated[CountOrZero, Field(le=1000)] = 3
    """How often a failed read is tried again, with backoff, before the sample is replaced."""
    max_failure_rate: Fraction = 0.01
    """The run stops when more than this share of the samples read could not be read."""
    max_pixels: Annotated[Count, Field(le=2**30)] = 64_000_000
    """An image with more pixels than this is treated as unreadable."""
    max_bytes: Annotated[Count, Field(le=2**32)] = 64_000_000
    """A file inside a shard larger than this many bytes is treated as unreadable."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.kind == "images" and (self.resolution < 4 or self.resolution & (self.resolution - 1)):
            raise ValueError(f"resolution: {self.resolution} is not a power of two from 4 up")
        return self
