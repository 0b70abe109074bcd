"""Latents of an autoencoder: .npy files of moments or of latents, and what a network gets of them.

Moments (2C, H, W) are the mean and, in the second half of the channels, the logarithm of the variance of a posterior
with independent coordinates, as autoencoders with a KL term have it (Kingma and Welling 2014, appendix B). A leading
axis of 2 holds those of the image and those of its mirror image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distgan.data.kinds import npy_file
from distgan.errors import UnreadableSampleError

MOMENTS, LATENT = "moments.npy", "latent.npy"
"""Extensions of the members."""
MAX_BYTES = 64 << 20
"""Largest size of a member."""
LOG_VARIANCES = -30.0, 20.0
"""Range that logarithms of variances are clamped to, as in diffusers, so that no variance overflows."""
_DTYPES = ("<f2", "<f4")

_Size = Annotated[int, Field(ge=1, le=1024)]
_Real = Annotated[float, Field(allow_inf_nan=False)]


class LatentSpace(BaseModel):
    """Shape of latents, and what makes them inputs of a network: (latent - shift) scale, for each channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: _Size
    resolution: _Size
    """Height and width."""
    shift: tuple[_Real, ...]
    scale: tuple[Annotated[_Real, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.shift) == len(self.scale) == self.channels:
            raise ValueError(
                f"found {len(self.shift)} shifts and {len(self.scale)} scales for {self.channels} channels of latents"
            )
        return self

    def difference(self, other: LatentSpace) -> str:
        """Return the first fact that differs, with both values; empty without any."""
        for name in LatentSpace.model_fields:
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                return f"{name}: found {others}, expected {own}"
        return ""


class ArrayKind(NamedTuple):
    """What the array of a member holds."""

    moments: bool
    """Moments, and not a latent."""
    flipped: bool
    """Those of the mirror image too."""
    channels: int
    resolution: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        channels = self.channels * (2 if self.moments else 1)
        return (*((2,) if self.flipped else ()), channels, self.resolution, self.resolution)


class StoredLatents(LatentSpace):
    """The latents of an index."""

    moments: bool
    flipped: bool

    @property
    def space(self) -> LatentSpace:
        """What a network and a decoder depend on."""
        return LatentSpace(**self.model_dump(include=set(LatentSpace.model_fields)))

    @property
    def kind(self) -> ArrayKind:
        """What each member holds."""
        return ArrayKind(self.moments, self.flipped, self.channels, self.resolution)


def read(data: bytes | memoryview, extension: str) -> tuple[ArrayKind, NDArray[np.floating]]:
    """Return what a member holds, and its array as stored.

    Raises:
        UnreadableSampleError: it is damaged, of another shape or dtype, or not finite.
    """
    values = npy_file.read_array(data, _DTYPES)
    moments, shape = extension == MOMENTS, values.shape
    channels, odd = divmod(shape[-3], 2 if moments else 1) if len(shape) in (3, 4) else (0, 1)
    if odd or not channels or not shape[-1] == shape[-2] > 0 or (len(shape) == 4 and shape[0] != 2):
        expected = "(2C, H, H), means and logarithms of variances," if moments else "(C, H, H)"
        raise UnreadableSampleError(f"wrong array: found shape {shape}, expected {expected} or (2, ...) with flips")
    if not np.isfinite(values).all():
        raise UnreadableSampleError("holds numbers that are not finite")
    return ArrayKind(moments, len(shape) == 4, channels, shape[-1]), values


@dataclass(frozen=True)
class DecodeLatent:
    """Decodes the members of an index into an array, float32 (2C, H, H) of moments or (C, H, H) of a latent."""

    stored: StoredLatents
    mirrored: bool = False
    """Take those of the mirror image."""

    def __call__(self, out: NDArray[np.float32], data: bytes | memoryview, extension: str) -> None:
        """Decode a member. Raises UnreadableSampleError if it is damaged, of another shape, or not finite."""
        kind, values = read(data, extension)
        if kind != self.stored.kind:
            raise UnreadableSampleError(
                f"wrong array: found shape {values.shape}, expected {self.stored.kind.shape} as in the index"
            )
        out[...] = values[int(self.mirrored)] if kind.flipped else values
