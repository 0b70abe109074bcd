"""One image on its way into a shard: checked, and cropped, resized or re-encoded where asked."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from distgan.data.images import fit_square, to_channels
from distgan.data.layout import MAX_PIXELS, BadSample, Encoded, Pixels

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

ImageFormat = Literal["keep", "png", "jpg", "webp"]
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_EXIF_HEADER = b"Exif\0\0"
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Conversion:
    """What is done to each image; called in worker processes.

    An image that needs no change keeps its bytes, after they were decoded once to see that they can be. The extension
    follows the content, whatever the file was called. Upright photographs: an EXIF orientation is applied, since
    readers of shards ignore it.
    """

    resolution: int | None = None
    """Crop the central square and resize it to this many pixels a side; None keeps size and shape."""
    image_format: ImageFormat = "keep"
    quality: int = 95
    """Of newly encoded jpg and webp images, 1 to 100; jpg without chroma subsampling."""

    def __call__(self, image: bytes | Pixels) -> Encoded:
        """Raises BadSample with the reason."""
        if not isinstance(image, bytes):
            return self._encode(self._fit(Image.fromarray(image)), "png")
        if self.resolution is None and self.image_format in ("keep", "jpg") and _is_plain_jpeg(image):
            return Encoded(image, "jpg")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._convert(image)
        except BadSample:
            raise
        except Exception as error:  # Pillow raises nearly everything on a damaged file
            raise BadSample(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None

    def _convert(self, data: bytes) -> Encoded:
        try:
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        except UnidentifiedImageError:
            raise BadSample("is not a JPEG, PNG or WebP image, or damaged from its start") from None
        _check_size(picture.width, picture.height)
        extension = _EXTENSIONS[picture.format or ""]
        picture.load()
        rotated = picture.getexif().get(_ORIENTATION, 1) in range(2, 9)
        fits = self.resolution is None or picture.size == (self.resolution, self.resolution)
        if fits and not rotated and self.image_format in ("keep", extension):
            return Encoded(data, extension)
        upright = ImageOps.exif_transpose(picture) if rotated else picture
        return self._encode(self._fit(_as_grey_or_rgb(upright)), extension)

    def _fit(self, picture: Image.Image) -> Image.Image:
        return picture if self.resolution is None else fit_square(picture, self.resolution)

    def _encode(self, picture: Image.Image, own_format: str) -> Encoded:
        extension = own_format if self.image_format == "keep" else self.image_format
        picture.info = {}  # Pillow would write the source's colour profile and comments into each PNG
        buffer = io.BytesIO()
        if extension == "jpg":
            picture.save(buffer, "JPEG", quality=self.quality, subsampling=0)
        elif extension == "webp":
            picture.save(buffer, "WEBP", quality=self.quality)
        else:
            picture.save(buffer, "PNG")
        return Encoded(buffer.getvalue(), extension)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a sound JPEG without EXIF data; the quick way for what most sets consist of.

    Decoding at an eighth of the size in grey reads all of the compressed data, so truncation shows.
    """
    if simplejpeg is None or not data.startswith(b"\xff\xd8") or data.find(_EXIF_HEADER, 0, 1 << 16) >= 0:
        return False
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)
    except ValueError:
        return False  # Pillow has the last word, and the better message
    return True


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(f"is {width} x {height}; at most {MAX_PIXELS} pixels are read")


def _as_grey_or_rgb(picture: Image.Image) -> Image.Image:
    grey = picture.mode in ("1", "L", "LA") or picture.mode.startswith("I")
    return to_channels(picture, 1 if grey else 3)
