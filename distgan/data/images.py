"""Image files into pixels, by an allow-list of formats: whatever lies under an extension must be of that format.

Conversions, the same for all formats: 16-bit grey keeps its high byte; palettes are looked up; colour to grey is luma
(ITU-R BT.601; of a JPEG, its own luma plane); grey to colour repeats; transparency is dropped and EXIF orientation
ignored, as by other readers of shards. An image of another size is cropped to its central square and resized, with
antialiasing, by Pillow.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distgan.errors import UnreadableSampleError

try:
    import simplejpeg
except ImportError:  # clusters' images rarely have it, and Pillow decodes everything that it does
    simplejpeg = None

Pixels = NDArray[np.uint8]
JPEG_DECODER = f"Pillow {PIL.__version__}" if simplejpeg is None else f"simplejpeg {version('simplejpeg')}"
"""What decodes JPEGs here. Others may differ from it by a level in some pixels."""
Data = bytes | memoryview
_MOST_PIXELS = 2**29  # beyond, decoders count bytes in 32 bits and overflow


def decode_into(out: Pixels, data: Data, extension: str, *, max_pixels: int) -> None:
    """Decode an image file into `out`.

    Args:
        out: uint8, shape (resolution, resolution, channels), contiguous, channels 1 (grey) or 3 (RGB).
        extension: one of `DECODERS`.
        max_pixels: an image that says it has more is refused before any pixel is decoded.

    Raises:
        UnreadableSampleError: too many pixels, damaged, or not of the format that the extension says.
    """
    try:
        DECODERS[extension](out, data, max_pixels)
    except UnreadableSampleError:
        raise
    except Exception as error:  # Pillow raises nearly everything on a damaged file
        raise UnreadableSampleError(" ".join(str(error).split()) or type(error).__name__) from None


def fit_square(picture: Image.Image, resolution: int) -> Image.Image:
    """The central square, resized to `resolution` pixels a side: Lanczos to shrink, bicubic to enlarge."""
    if picture.size == (resolution, resolution):
        return picture
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    # Lanczos is the sharper low-pass filter; enlarging with it rings around strokes more than cubic does.
    resampling = Image.Resampling.LANCZOS if side > resolution else Image.Resampling.BICUBIC
    return square.resize((resolution, resolution), resampling)


def to_channels(picture: Image.Image, channels: int) -> Image.Image:
    """Any mode as 8-bit grey (1) or RGB (3)."""
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        high = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _decode_jpeg(out: Pixels, data: Data, max_pixels: int) -> None:
    if simplejpeg is None:
        return _decode_with_pillow(out, data, max_pixels, "JPEG")
    colours = "GRAY" if out.shape[2] == 1 else "RGB"
    try:
        # Always the header first: simplejpeg computes the size of huge images in 32 bits, and would not notice
        # that they overflow the buffer.
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if stored in ("CMYK", "YCCK"):
            return _decode_with_pillow(out, data, max_pixels, "JPEG")
        if (height, width) == out.shape[:2]:
            simplejpeg.decode_jpeg(data, colours, buffer=out)
            return
        _check_pixels(width, height, max_pixels)
        pixels = simplejpeg.decode_jpeg(data, colours)
    except UnreadableSampleError:
        raise
    except ValueError:  # it is strict; Pillow has the last word, as when packing
        return _decode_with_pillow(out, data, max_pixels, "JPEG")
    _put(out, Image.fromarray(pixels[..., 0] if out.shape[2] == 1 else pixels))


def _decode_png(out: Pixels, data: Data, max_pixels: int) -> None:
    _decode_with_pillow(out, data, max_pixels, "PNG")


def _decode_webp(out: Pixels, data: Data, max_pixels: int) -> None:
    _decode_with_pillow(out, data, max_pixels, "WEBP")


def _decode_with_pillow(out: Pixels, data: Data, max_pixels: int, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=(kind,))
        except UnidentifiedImageError:  # whose message is an address in memory
            raise UnreadableSampleError(f"is not a {kind} image") from None
        with picture:
            _check_pixels(picture.width, picture.height, max_pixels)
            picture.load()
            _put(out, to_channels(picture, out.shape[2]))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    most = min(max_pixels, _MOST_PIXELS)
    if width * height > most:
        raise UnreadableSampleError(f"{width} x {height} pixels; at most {most:,} are decoded (data.max_pixels)")


def _put(out: Pixels, picture: Image.Image) -> None:
    fitted = np.asarray(fit_square(picture, out.shape[0]))
    out[...] = fitted.reshape(out.shape)


DECODERS: dict[str, Callable[[Pixels, Any, int], None]] = {
    "jpg": _decode_jpeg,
    "jpeg": _decode_jpeg,
    "png": _decode_png,
    "webp": _decode_webp,
}
"""How images are decoded by extension; nothing else ever is."""
