"""Convert one image for a shard: check it, and crop, resize or re-encode it on request."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from distgan.data.kinds.images import (
    WHITE,
    fit_square,
    flatten,
    has_metadata,
    is_transparent,
    open_image,
    orientation,
    to_channels,
    upright,
)
from distgan.data.packing.sources.source import MAX_PIXELS, Encoded, Facts, InvalidSampleError, Pixels
from distgan.errors import UnreadableSampleError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

ImageFormat = Literal["keep", "png", "jpg", "webp"]
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Conversion:
    """Settings of the conversion of each image; called in worker processes.

    An image that needs no change keeps its bytes. It is still decoded once to check that it is readable. The extension
    follows the content, not the file name. Images that are not upright are rotated, because other readers of shards do
    not rotate them.
    """

    resolution: int | None = None
    """Pixels per side of the central square after cropping and resizing; None keeps the size."""
    image_format: ImageFormat = "keep"
    quality: int = 95
    """Quality of newly encoded jpg and lossy webp images, 1 to 100. Jpg uses no chroma subsampling. Lossless webp stays
    lossless."""
    background: tuple[int, int, int] | None = None
    """RGB color behind transparent images, 0 to 255. None composites on white only the images that change anyway."""

    def __call__(self, image: bytes | Pixels) -> Encoded:
        """Convert one image. Raises InvalidSampleError with the reason."""
        if not isinstance(image, bytes):
            return self._encode(self._fit(Image.fromarray(image)), "png", Facts())
        if self.resolution is None and self.image_format in ("keep", "jpg") and _is_plain_jpeg(image):
            return Encoded(image, "jpg")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._convert(image)
        except InvalidSampleError:
            raise
        except Exception as error:  # Pillow raises nearly everything on a damaged file
            raise InvalidSampleError(
                f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"
            ) from None

    def _convert(self, data: bytes) -> Encoded:
        try:
            picture = open_image(data)
        except UnreadableSampleError as error:
            raise InvalidSampleError(str(error)) from None
        _check_size(picture.width, picture.height)
        extension = _EXTENSIONS[picture.format or ""]
        picture.load()
        facts = Facts(is_transparent(picture), _deepest(picture))
        turn = orientation(picture)
        fits = self.resolution is None or picture.size == (self.resolution, self.resolution)
        opaque = self.background is None or not facts.transparent
        if fits and opaque and turn == 1 and self.image_format in ("keep", extension):
            return Encoded(data, extension, facts)
        shown = _as_gray_or_rgb(upright(flatten(picture, self.background or WHITE), turn))
        facts = facts._replace(composited=facts.transparent)
        return self._encode(self._fit(shown), extension, facts, lossless=is_lossless_webp(data))

    def _fit(self, picture: Image.Image) -> Image.Image:
        return picture if self.resolution is None else fit_square(picture, self.resolution)

    def _encode(self, picture: Image.Image, own_format: str, facts: Facts, *, lossless: bool = False) -> Encoded:
        extension = own_format if self.image_format == "keep" else self.image_format
        picture.info = {}  # otherwise Pillow writes the source's color profile and comments into each PNG
        buffer = io.BytesIO()
        if extension == "jpg":
            picture.save(buffer, "JPEG", quality=self.quality, subsampling=0)
        elif extension == "webp":
            picture.save(buffer, "WEBP", quality=self.quality, lossless=lossless)
        else:
            picture.save(buffer, "PNG")
        return Encoded(buffer.getvalue(), extension, facts)


def is_lossless_webp(data: bytes) -> bool:
    """Return True if a WebP image, or its first frame, is lossless (RFC 9649, sections 2.6, 2.7)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return False
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        # A frame's chunks follow its 16-byte header.
        place += 8 + 16 if kind == b"ANMF" else 8 + size + size % 2
    return False


def _deepest(picture: Image.Image) -> int | None:
    return int(np.asarray(picture).max()) if picture.mode.startswith("I") else None


def _is_plain_jpeg(data: bytes) -> bool:
    """Return True for a valid JPEG without EXIF or XMP data: a fast check for the most common case.

    Decoding in gray at an eighth of the size reads all compressed data and therefore detects truncation.
    """
    if simplejpeg is None or not data.startswith(b"\xff\xd8") or has_metadata(data):
        return False
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)
    except ValueError:
        return False  # Pillow decides, and has the better message
    return True


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidSampleError(
            f"image too large: found {width} x {height} pixels, expected at most {MAX_PIXELS} pixels"
        )


def _as_gray_or_rgb(picture: Image.Image) -> Image.Image:
    gray = picture.mode in ("1", "L", "LA") or picture.mode.startswith("I")
    return to_channels(picture, 1 if gray else 3)
