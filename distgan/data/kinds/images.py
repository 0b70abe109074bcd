"""Decode image files into pixels. Supports JPEG, PNG and WebP, identified by content and not by extension.

The same rules apply to all formats, in packing and in training:

- Rotate images upright by their EXIF orientation, or by XMP without EXIF, as read by Pillow.
- Composite transparent images on a background.
- Keep the high byte of 16-bit gray. Look up palette colors.
- Convert color to gray by luma (ITU-R BT.601; the luma plane of a JPEG). Convert gray to color by repetition.
- Crop an image of another size to its central square and resize it with antialiasing in Pillow.
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
except ImportError:  # optional: cluster images rarely have it, and Pillow decodes the same files
    simplejpeg = None

Pixels = NDArray[np.uint8]
JPEG_DECODER = f"Pillow {PIL.__version__}" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"
"""Name and version of the JPEG decoder. Other decoders may differ by one level in some pixels."""
Data = bytes | memoryview
FORMATS = "JPEG", "PNG", "WEBP"
"""Supported formats, as named by Pillow."""
WHITE = (255, 255, 255)
_MOST_PIXELS = 2**29  # decoders count bytes in 32 bits, which overflows above this
_JPEG = b"\xff\xd8"
_APP1, _SCAN_OR_END, _ALONE = 0xE1, (0xDA, 0xD9), (0x01, *range(0xD0, 0xD8))
"""JPEG markers (ITU-T T.81, table B.1)."""
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
"""Transform that turns each orientation upright (EXIF 2.32, tag 0x0112)."""


def decode_into(
    out: Pixels, data: Data, extension: str, *, max_pixels: int, background: tuple[int, int, int] = WHITE
) -> None:
    """Decode an image file into `out`.

    Args:
        out: uint8, shape (resolution, resolution, channels), contiguous, channels 1 (gray) or 3 (RGB).
        extension: unused; the content identifies the format.
        max_pixels: maximum width x height, checked before any pixel is decoded.
        background: RGB color behind transparent images, 0 to 255.

    Raises:
        UnreadableSampleError: the image has too many pixels, is damaged, or has an unsupported format.
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
    """Open an image without decoding its pixels. Raises UnreadableSampleError for an unsupported format."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its message is a memory address
        raise UnreadableSampleError("is not a JPEG, PNG or WebP image, or is damaged at its start") from None


def orientation(picture: Image.Image) -> int:
    """Return the orientation of an image from EXIF, or from XMP without EXIF: 1 (upright) to 8."""
    found = picture.getexif().get(_ORIENTATION, 1)
    return found if found in _TURNS else 1


def upright(picture: Image.Image, turn: int) -> Image.Image:
    """Turn an image of this orientation upright."""
    return picture.transpose(_TURNS[turn]) if turn in _TURNS else picture


def has_metadata(data: Data) -> bool:
    """Return True if a JPEG has EXIF or XMP data (APP1) in any segment, and so may need rotation."""
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return True  # a marker is missing; a decoder may still find metadata
        marker = data[place + 1]
        if marker == _APP1:
            return True
        if marker in _SCAN_OR_END:
            return False
        # Skip fill bytes, and markers without a length.
        place += 1 if marker == 0xFF else 2 if marker in _ALONE else 2 + int.from_bytes(data[place + 2 : place + 4])
    return False


def is_transparent(picture: Image.Image) -> bool:
    """Return True if any pixel of a decoded image is not opaque."""
    if not picture.has_transparency_data:
        return False
    lowest, _ = _alpha(picture).getextrema()
    return bool(lowest != 255)  # one channel of 8 bits


def flatten(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Composite a decoded image on a background if it has transparency; return a gray or RGB image."""
    if not picture.has_transparency_data:
        return picture
    gray = picture.mode in ("1", "L", "LA") or picture.mode.startswith("I")
    alpha = _alpha(picture)
    opaque = to_channels(picture, 3)
    composed = Image.composite(opaque, Image.new("RGB", picture.size, background), alpha)
    return composed.convert("L") if gray and len(set(background)) == 1 else composed


def _alpha(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # Pillow does not convert the one transparent level of this mode
        levels = np.asarray(picture).astype(np.int64)
        return Image.fromarray(np.where(levels == picture.info["transparency"], 0, 255).astype(np.uint8))
    return picture.convert("RGBA").getchannel("A")


def fit_square(picture: Image.Image, resolution: int) -> Image.Image:
    """Crop the central square and resize it to `resolution` pixels per side: Lanczos to shrink, bicubic to enlarge."""
    if picture.size == (resolution, resolution):
        return picture
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    # Lanczos is the sharper low-pass filter, but rings more than bicubic when enlarging.
    resampling = Image.Resampling.LANCZOS if side > resolution else Image.Resampling.BICUBIC
    return square.resize((resolution, resolution), resampling)


def put(out: Pixels, picture: Image.Image) -> None:
    """Write an image of any mode and size into `out`: converted to its channels, cropped and resized."""
    fitted = np.asarray(fit_square(to_channels(picture, out.shape[2]), out.shape[0]))
    out[...] = fitted.reshape(out.shape)


def to_channels(picture: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any mode to 8-bit gray (1 channel) or RGB (3 channels)."""
    if picture.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion would clip at 255
        high = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _decode_jpeg(out: Pixels, data: Data, max_pixels: int) -> None:
    colors = "GRAY" if out.shape[2] == 1 else "RGB"
    try:
        # Read the header first: simplejpeg computes sizes in 32 bits and does not detect that a huge image overflows
        # the buffer.
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
    except ValueError:  # simplejpeg is stricter than Pillow, which also decides when packing
        return _decode_with_pillow(out, data, max_pixels, WHITE)
    put(out, upright(Image.fromarray(pixels[..., 0] if out.shape[2] == 1 else pixels), turn))


def _decode_with_pillow(out: Pixels, data: Data, max_pixels: int, background: tuple[int, int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(data) as picture:
            _check_pixels(picture.width, picture.height, max_pixels)
            picture.load()
            turned = upright(flatten(picture, background), orientation(picture))
            put(out, turned)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    most = min(max_pixels, _MOST_PIXELS)
    if width * height > most:
        raise UnreadableSampleError(
            f"image too large: found {width} x {height} pixels, expected at most {most:,} (data.max_pixels)"
        )
