"""Image files into pixels: JPEG, PNG and WebP by their content, whatever their extension says; nothing else.

One rule for all formats and all ways in. Pictures are turned upright as their EXIF data say, or their XMP data where
there are none (Pillow's reading of both). Transparent ones are composited on a background. 16-bit gray keeps its high
byte; palettes are looked up; color to gray is luma (ITU-R BT.601; of a JPEG, its own luma plane); gray to color
repeats. An image of another size is cropped to its central square and resized, with antialiasing, by Pillow.
"""

from __future__ import annotations

import io
import warnings

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
JPEG_DECODER = f"Pillow {PIL.__version__}" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"
"""What decodes JPEGs here. Others may differ from it by a level in some pixels."""
Data = bytes | memoryview
FORMATS = "JPEG", "PNG", "WEBP"
"""What is decoded, by the names that Pillow has for them; nothing else ever is."""
WHITE = (255, 255, 255)
_MOST_PIXELS = 2**29  # beyond, decoders count bytes in 32 bits and overflow
_JPEG = b"\xff\xd8"
_APP1, _SCAN_OR_END, _ALONE = 0xE1, (0xDA, 0xD9), (0x01, *range(0xD0, 0xD8))
"""Markers of JPEG (ITU-T T.81, table B.1)."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each orientation upright (EXIF 2.32, tag 0x0112)."""


def decode_into(
    out: Pixels, data: Data, extension: str, *, max_pixels: int, background: tuple[int, int, int] = WHITE
) -> None:
    """Decode an image file into `out`.

    Args:
        out: uint8, shape (resolution, resolution, channels), contiguous, channels 1 (gray) or 3 (RGB).
        extension: one of the index's; which of the formats it is, the content says.
        max_pixels: an image that says it has more is refused before any pixel is decoded.
        background: what transparent images are composited on.

    Raises:
        UnreadableSampleError: too many pixels, damaged, or of no format that is read.
    """
    try:
        if data[:2] == _JPEG and simplejpeg is not None:
            _decode_jpeg(out, data, max_pixels)
        else:
            _decode_with_pillow(out, data, max_pixels, background)
    except UnreadableSampleError:
        raise
    except Exception as error:  # Pillow raises nearly everything on a damaged file
        raise UnreadableSampleError(" ".join(str(error).split()) or type(error).__name__) from None


def open_image(data: Data) -> Image.Image:
    """A picture whose pixels are not decoded yet. Raises UnreadableSampleError if it is of no format that is read."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # whose message is an address in memory
        raise UnreadableSampleError("is not a JPEG, PNG or WebP image, or damaged from its start") from None


def orientation(picture: Image.Image) -> int:
    """How a picture lies, 1 (upright) to 8, as its EXIF data say, or its XMP data where there are none."""
    found = picture.getexif().get(_ORIENTATION, 1)
    return found if found in _TURNS else 1


def upright(picture: Image.Image, turn: int) -> Image.Image:
    """A picture of an orientation, turned so that it is upright."""
    return picture.transpose(_TURNS[turn]) if turn in _TURNS else picture


def has_metadata(data: Data) -> bool:
    """Whether a JPEG has EXIF or XMP data (APP1), and so may not be upright; they may come after any other segment."""
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return True  # no marker where one should be: whoever decodes it may see more
        marker = data[place + 1]
        if marker == _APP1:
            return True
        if marker in _SCAN_OR_END:
            return False
        # Fill bytes, and markers without a length.
        place += 1 if marker == 0xFF else 2 if marker in _ALONE else 2 + int.from_bytes(data[place + 2 : place + 4])
    return False


def is_transparent(picture: Image.Image) -> bool:
    """Whether any pixel of a decoded picture is not opaque."""
    if not picture.has_transparency_data:
        return False
    lowest, _ = _alpha(picture).getextrema()
    return bool(lowest != 255)  # one channel of 8 bits


def flatten(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A decoded picture without transparency: composited on a background if it has any, gray or RGB."""
    if not picture.has_transparency_data:
        return picture
    gray = picture.mode in ("1", "L", "LA") or picture.mode.startswith("I")
    alpha = _alpha(picture)
    opaque = to_channels(picture, 3)
    composed = Image.composite(opaque, Image.new("RGB", picture.size, background), alpha)
    return composed.convert("L") if gray and len(set(background)) == 1 else composed


def _alpha(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # whose one transparent level Pillow does not convert
        levels = np.asarray(picture).astype(np.int64)
        return Image.fromarray(np.where(levels == picture.info["transparency"], 0, 255).astype(np.uint8))
    return picture.convert("RGBA").getchannel("A")


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
    """Any mode as 8-bit gray (1) or RGB (3)."""
    if picture.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255
        high = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _decode_jpeg(out: Pixels, data: Data, max_pixels: int) -> None:
    colors = "GRAY" if out.shape[2] == 1 else "RGB"
    try:
        # Always the header first: simplejpeg computes the size of huge images in 32 bits, and would not notice
        # that they overflow the buffer.
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if stored in ("CMYK", "YCCK"):
            return _decode_with_pillow(out, data, max_pixels, WHITE)
        turn = orientation(open_image(data)) if has_metadata(data) else 1
        if turn == 1 and (height, width) == out.shape[:2]:
            simplejpeg.decode_jpeg(data, colors, buffer=out)
            return
        _check_pixels(width, height, max_pixels)
        pixels = simplejpeg.decode_jpeg(data, colors)
    except UnreadableSampleError:
        raise
    except ValueError:  # it is strict; Pillow has the last word, as when packing
        return _decode_with_pillow(out, data, max_pixels, WHITE)
    _put(out, upright(Image.fromarray(pixels[..., 0] if out.shape[2] == 1 else pixels), turn))


def _decode_with_pillow(out: Pixels, data: Data, max_pixels: int, background: tuple[int, int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(data) as picture:
            _check_pixels(picture.width, picture.height, max_pixels)
            picture.load()
            turned = upright(flatten(picture, background), orientation(picture))
            _put(out, to_channels(turned, out.shape[2]))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    most = min(max_pixels, _MOST_PIXELS)
    if width * height > most:
        raise UnreadableSampleError(f"{width} x {height} pixels; at most {most:,} are decoded (data.max_pixels)")


def _put(out: Pixels, picture: Image.Image) -> None:
    fitted = np.asarray(fit_square(picture, out.shape[0]))
    out[...] = fitted.reshape(out.shape)
