"""One image into a shard: what is kept, what is re-encoded, how it is cropped and resized, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distgan.data.packing.conversion import Conversion
from distgan.data.packing.sources.source import Encoded, InvalidSampleError


def encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(encoded: Encoded) -> np.ndarray:
    picture = Image.open(io.BytesIO(encoded.data))
    assert {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[picture.format] == encoded.extension
    return np.asarray(picture)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_keeping_returns_the_very_bytes(kind: str, extension: str, channels: int) -> None:
    if kind == "JPEG" and channels == 4:
        buffer = io.BytesIO()
        Image.new("CMYK", (8, 8)).save(buffer, "JPEG")
        data = buffer.getvalue()
    else:
        data = encode(noise(12, 20, channels), kind)
    assert Conversion()(data)[:2] == (data, extension)
    assert Conversion(image_format=extension)(data)[:2] == (data, extension)


def test_an_image_of_the_resolution_is_kept() -> None:
    data = encode(noise(16, 16), "JPEG")
    assert Conversion(resolution=16)(data).data == data
    assert Conversion(resolution=8)(data).data != data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_formats(kind: str, extension: str) -> None:
    rows, columns = np.mgrid[0:16, 0:24]
    smooth = np.stack((rows * 10, columns * 10, 255 - rows * 5), axis=-1).astype(np.uint8)
    converted = decode(Conversion(image_format=extension)(encode(smooth, kind)))
    assert converted.shape == smooth.shape
    assert np.abs(converted.astype(int) - smooth).mean() < 6


def test_png_of_a_png_is_lossless_and_bare() -> None:
    pixels = noise(20, 12)
    picture = Image.fromarray(pixels)
    picture.info = {"icc_profile": b"x" * 1000}
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", icc_profile=b"x" * 5000)
    converted = Conversion(resolution=12)(buffer.getvalue())
    assert np.array_equal(decode(converted), pixels[4:16])  # the central square, not resized
    assert b"iCCP" not in converted.data


def test_quality_counts() -> None:
    data = encode(noise(32, 32), "PNG")
    sizes = [len(Conversion(image_format="jpg", quality=quality)(data).data) for quality in (10, 50, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 3


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (9, 23)])
@pytest.mark.parametrize("resolution", [4, 8, 32])
def test_the_central_square_is_resized(height: int, width: int, resolution: int) -> None:
    side = min(height, width)
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = (200, 100, 50)
    converted = decode(Conversion(resolution=resolution)(encode(pixels, "PNG")))
    assert converted.shape == (resolution, resolution, 3)
    assert (converted == (200, 100, 50)).all()


def test_shrinking_averages() -> None:
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    converted = decode(Conversion(resolution=16)(encode(checkerboard, "PNG")))
    assert np.abs(converted.astype(int) - 127.5).max() < 15  # taking pixels out would give 0 or 255


def test_raw_pixels_become_png() -> None:
    pixels = noise(8, 8, 1)
    assert np.array_equal(decode(Conversion()(pixels)), pixels)
    assert Conversion()(pixels).extension == "png"
    assert Conversion(image_format="jpg")(pixels).extension == "jpg"
    assert decode(Conversion(resolution=32)(pixels)).shape == (32, 32)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    data = encode(np.array([[0, 255, 256, 0x8000, 0xFFFF]] * 5, np.uint16), "PNG")
    assert decode(Conversion(image_format="webp")(data)).shape == (5, 5, 3)
    picture = Image.open(io.BytesIO(data))
    assert picture.mode.startswith("I")
    square = encode(np.full((6, 5), 0x8000, np.uint16), "PNG")
    assert (decode(Conversion(resolution=5)(square)) == 0x80).all()


def test_transparency_and_palettes() -> None:
    colors = noise(6, 5, 4)
    alpha = colors[:5, :, 3:] / 255
    for background, level in ((None, 255), ((0, 0, 0), 0)):
        composed = colors[:5, :, :3] * alpha + level * (1 - alpha)
        converted = Conversion(resolution=5, background=background)(encode(colors, "PNG"))
        assert np.abs(decode(converted) - composed).max() <= 1
        assert converted.facts.composited
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), (9, 8, 7), np.uint8)).quantize(4).save(buffer, "PNG")
    assert (decode(Conversion(resolution=5)(buffer.getvalue())) == (9, 8, 7)).all()


@pytest.mark.parametrize("resolution", [None, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_set_upright(kind: str, resolution: int | None) -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8, 8:] = 255  # top right
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright: top right goes to bottom right
    options = {"lossless": True} if kind == "WEBP" else {}
    converted = decode(Conversion(resolution=resolution)(encode(pixels, kind, exif=exif, **options)))
    quadrants = converted.reshape(2, converted.shape[0] // 2, 2, converted.shape[1] // 2, -1)
    bright = quadrants.mean(axis=(1, 3, 4))
    assert bright[1, 1] > 230
    assert max(bright[0, 0], bright[0, 1], bright[1, 0]) < 25
    exif[0x0112] = 1
    data = encode(pixels, kind, exif=exif)
    assert Conversion()(data).data == data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("options", [{}, {"resolution": 16}, {"image_format": "png"}])
def test_truncated_images(kind: str, share: float, options: dict) -> None:
    data = encode(noise(64, 64), kind)
    if kind == "PNG" and options == {"image_format": "png"}:
        options = {}
    with pytest.raises(InvalidSampleError) as error:
        Conversion(**options)(data[: int(share * len(data))])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data", [b"hello", b"GIF89a" + bytes(50), b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF", b"\x80\x04N."]
)
def test_other_formats(data: bytes) -> None:
    with pytest.raises(InvalidSampleError, match=r"not a JPEG, PNG or WebP|cannot be decoded"):
        Conversion()(data)


def test_a_gif_is_refused_whatever_its_name() -> None:
    with pytest.raises(InvalidSampleError, match="not a JPEG, PNG or WebP"):
        Conversion()(encode(noise(8, 8, 1), "GIF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixel_cap(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("distgan.data.packing.conversion.MAX_PIXELS", 10 * 30)
    Conversion()(encode(noise(10, 30), kind))
    with pytest.raises(InvalidSampleError, match="31 x 10 pixels, expected at most 300 pixels"):
        Conversion()(encode(noise(10, 31), kind))
