"""What is trained on, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, WrapValidator, model_validator

from distgan.config.autoencoder import AutoencoderConfig
from distgan.config.fields import Color, Count, CountOrZero, Fraction, Positive, Real, Section, Size
from distgan.config.named import BuiltIn, NamedSection


class StagesOptions(Section):
    """Options of data stages. Class variables are facts that reading depends on."""

    members: ClassVar[tuple[str, ...]] = ()
    """Extensions of the members that a sample consists of, such as `png` and `txt`. `jpg;png` takes either."""


class StagesConfig(NamedSection):
    """WebDataset stages in your own code, from the members of a sample to its value. The other keys are options."""

    naming_key: ClassVar = "stages"
    built_in: ClassVar[dict[str, BuiltIn]] = {}
    facts_base: ClassVar = StagesOptions

    stages: str
    """Import path of a function that returns a list of WebDataset stages."""


class SourceConfig(Section):
    """One of several sources of data that are mixed by weight."""

    path: str | list[str]
    """Shards of the source, as in `data.path`. A shard belongs to one source only."""
    weight: Annotated[Positive, Field(le=1e9)]
    """Share of the source in the samples that are drawn, relative to the other weights."""

    def __repr__(self) -> str:
        return f"{{path: {self.path}, weight: {self.weight:g}}}"


DataPath = str | list[str] | list[SourceConfig]
"""Shards of one source, or several sources."""
_SMALLEST_SHARE = 1e-6


def paths_of(path: DataPath) -> list[str]:
    """Return the paths of all shards that `data.path` names."""
    if isinstance(path, str):
        return [path]
    return [inner for item in path for inner in ([item] if isinstance(item, str) else paths_of(item.path))]


def _path(value: Any, _: Any) -> Any:
    """Return shards or sources. The union's own check would report a mistake once for each member."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(item, str) for item in items):
        return value
    if not isinstance(value, list) or not all(isinstance(item, (Mapping, SourceConfig)) for item in items):
        raise ValueError(
            f"found {str(value)[:80]}; expected shards such as datasets/photos, a list of these, or a list of sources, "
            "each as {path: ..., weight: ...}"
        )
    sources = _SOURCES.validate_python(value)
    total = sum(source.weight for source in sources)
    for source in sources:
        if source.weight < _SMALLEST_SHARE * total:
            raise ValueError(
                f"the weight {source.weight:g} of {source.path} is below {_SMALLEST_SHARE:g} of the sum of all weights,"
                f" {total:g}; raise it, or leave the source out"
            )
    return sources


_SOURCES: TypeAdapter[list[SourceConfig]] = TypeAdapter(list[SourceConfig])


class DataConfig(Section):
    """Training data, and how it is read."""

    takes_effect_with: ClassVar = {
        **dict.fromkeys(("background", "dequantize", "max_pixels"), ("kind", ("images",))),
        **dict.fromkeys(("resolution", "channels", "mirror"), ("kind", ("images", "latents"))),
        "length": ("kind", ("text",)),
        "dimensions": ("kind", ("points",)),
        "decoder": ("kind", ("latents",)),
        **dict.fromkeys(("lanes", "shuffle_block"), ("order", ("lanes",))),
    }

    kind: Literal["images", "text", "points", "latents"] = "images"
    """Kind of sample: an image, a line of text, a point of a few numbers, or the latent of an autoencoder
    ([latents](latents.md))."""

    path: Annotated[DataPath, WrapValidator(_path)]
    """Shards: a folder, a glob, a brace expansion, a URL that fsspec understands, or a list of these. Or a list of
    sources to mix by weight, such as `[{path: A, weight: 3}, {path: B, weight: 1}]`."""
    resolution: Annotated[CountOrZero, Field(le=2**16)] = 0
    """Height and width of the images in pixels, from 4 up; a power of two for distgan's networks. Images are cropped to
    their central square and resized to it. Required for images. Of latents it is that of their shards."""
    channels: Annotated[Count, Field(le=1024)] = 3
    """Channels of the images: 1 for grayscale, 3 for RGB. Other images are converted. Of latents it is that of their
    shards, without the variances."""
    background: Color = "white"
    """Color that transparent images are composited on: `white`, `black`, `gray`, or `#rrggbb`."""
    decoder: AutoencoderConfig | None = None
    """Autoencoder whose decoder makes images of generated latents, for sample grids, metrics, samples and exports: a
    run or an export of an autoencoder, a folder of diffusers' AutoencoderKL, or an import path. null: latents are not
    decoded. See [latents](latents.md)."""
    stages: StagesConfig | None = None
    """WebDataset stages that make a sample of its members. null: images, lines and points are read as they are."""
    labels: bool = False
    """Condition both networks on the class labels of the shards."""
    length: Annotated[Size, Field(ge=4)] = 32
    """Length of a line of text in characters. Longer lines are cut, shorter ones padded."""
    dimensions: Size = 2
    """Number of coordinates of a point."""
    dequantize: bool = False
    """Map 8-bit pixels x to 2x/256 - 1 + u, with u drawn from U[0, 1/128), as the code of WGAN-GP and SNGAN does.
    Generated values y become the pixels floor(128 (y + 1)), without it round(127.5 (y + 1))."""
    mirror: bool = False
    """Flip each image left-right with probability 1/2, as a function of the seed and the stream position. Latents need
    shards that hold those of the mirror images too (`encode --flips`)."""
    order: Literal["permutation", "lanes"] = "permutation"
    """Order of the samples. `permutation` shuffles all samples, for local data. `lanes` reads a few shards at a time,
    for object stores."""
    lanes: Annotated[Count, Field(le=2**20)] = 16
    """Number of lanes in the `lanes` order. Choose about the largest number of nodes that the run will use."""
    shuffle_block: Count = 4096
    """Number of samples of a lane that are shuffled together in the `lanes` order."""
    num_workers: Annotated[CountOrZero, Field(le=1024)] = 2
    """Number of data loader workers per rank; 0 reads in the training process. The data does not depend on it."""
    prefetch: Annotated[Count, Field(le=1024)] = 2
    """Number of batches that each data loader worker keeps ready."""
    cache_dir: str | None = None
    """Node-local folder that keeps remote shards. null: `$DISTGAN_CACHE`, or `~/.cache/distgan`."""
    cache_gigabytes: Annotated[Real, Field(gt=0, le=1e9)] = 50.0
    """Largest size of the cache folder, in 1e9 bytes."""
    retries: Annotated[CountOrZero, Field(le=1000)] = 3
    """Number of times a failed read is repeated, with backoff, before another sample replaces it."""
    max_failure_rate: Fraction = 0.01
    """Largest fraction of unreadable samples. The run stops when more of those it read were unreadable."""
    max_pixels: Annotated[Count, Field(le=2**30)] = 64_000_000
    """Largest number of pixels of an image. A larger image is unreadable."""
    max_bytes: Annotated[Count, Field(le=2**32)] = 64_000_000
    """Largest size of a file inside a shard, in bytes; with `stages`, of all files of a sample. A larger one is
    unreadable."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.kind in ("images", "latents") and self.resolution < 4:
            found = f"{self.resolution} is below 4 pixels" if self.resolution else f"missing; {self.kind} need it"
            raise ValueError(f"resolution: {found}")
        if self.kind == "images" and self.channels not in (1, 3):
            raise ValueError(f"channels: {self.channels}: images have 1 (grayscale) or 3 (RGB)")
        if self.kind == "latents" and self.stages is not None:
            raise ValueError("stages: make images, text or points, and no latents; leave them out, or change kind")
        return self
